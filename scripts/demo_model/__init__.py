"""Parts of the demo model's training program (see ``docs/demo-model.md``)."""
