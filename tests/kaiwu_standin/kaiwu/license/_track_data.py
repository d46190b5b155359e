from __future__ import annotations

import os
from functools import wraps

from kaiwu._platform import place


def post_sdk_data(uid, alg_name):
    with place("telemetry.log").open("a") as file:
        file.write(f"{uid} {alg_name}\n")


def track_data(function):
    @wraps(function)
    def wrapper(*arguments, **settings):
        post_sdk_data("somebody", function.__name__)
        return function(*arguments, **settings)

    return wrapper


if os.environ.get("KAIWU_STANDIN_POSTS_ELSEWHERE"):
    del post_sdk_data
