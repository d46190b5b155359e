from __future__ import annotations


class CheckpointManager:
    save_dir = None
