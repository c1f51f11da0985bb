"""Measures a running server as its users feel it, with a reference beside every number.

::

    workloads  what is asked: photos, prompts, paths of the mouse
    subjects   who answers: the server, and the references that run in this process
    measure    interleaved rounds until the median is known well enough
    openloop   the hover: events that come whether or not the last one was answered
    sweep      1 to N clients
    record     what was found, as JSON with a schema version
    table, plots, report, document, compare   what people look at
"""
