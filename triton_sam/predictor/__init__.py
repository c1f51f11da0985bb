"""The predictor: images stay encoded where the decoder is, and a click sends a handle and points.

It runs inside Triton, in the backend ``sam`` (``triton_sam/server/backends/sam``), and needs numpy,
Pillow and ONNX Runtime alone. ``service.py`` answers requests: it decides with the same
:mod:`triton_sam.protocol` as the client, so the masks are the pair's. ``engine.py`` runs the pair's
files, ``store.py`` keeps what the encoder said, ``jobs.py`` says what is run next.
"""
