"""Routers learn: objectives, the LightningModule, what a run writes and how it resumes."""
