"""Conversion of configurations that earlier versions recorded."""

from typing import Any

ADDED: dict[str, dict[str, Any]] = {"ema": {"decays": []}}
LEVELS = {"_target_": "diffusion.training.levels.Uniform", "_partial_": True, "weight": "one", "gamma": 5.0}
LR_SCHEDULE = "diffusion.training.lr_schedule.Constant"


def migrated(content: dict[str, Any]) -> dict[str, Any]:
    """Convert the recorded settings of a run or checkpoint of any earlier version to those of this version.

    optimizer.warmup_steps      becomes lr_schedule.warmup_steps
    levels                      is added: earlier versions had uniform levels only
    ADDED                       settings that did not exist, with the values that were in effect
    """
    for group, added in ADDED.items():
        if isinstance(content.get(group), dict):
            content = {**content, group: {**added, **content[group]}}
    optimizer = content.get("optimizer")
    if isinstance(optimizer, dict) and "warmup_steps" in optimizer and "lr_schedule" not in content:
        rest = {key: value for key, value in optimizer.items() if key != "warmup_steps"}
        course = {"_target_": LR_SCHEDULE, "warmup_steps": optimizer["warmup_steps"]}
        content = {**content, "optimizer": rest, "lr_schedule": course}
    if "objective" in content and "levels" not in content:
        content = {**content, "levels": LEVELS}
    return content
