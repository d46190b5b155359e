from __future__ import annotations

import os

from kaiwu._platform import note, place

from ._track_data import track_data

__all__ = ["ensure_license", "init", "track_data"]


def init(user_id, sdk_code):
    note("init")
    if sdk_code != "sdk-code-of-the-stand-in":
        raise ValueError(f"License download failed for {user_id}, {sdk_code}")
    place("license.lic").write_text(f"{user_id} {sdk_code}")


def ensure_license():
    """Ask at the console where there is none, as the SDK does."""
    if os.environ.get("KAIWU_STANDIN_IS_FREE") or place("license.lic").exists():
        return
    try:
        input("Please enter user ID: ")
    except EOFError as error:
        raise ValueError(str(error)) from error
