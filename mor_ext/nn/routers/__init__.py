"""Routers, a file each: which tokens go on at each depth. ``router.py`` has their interface."""

from mor_ext.nn.routers.action import ActionRouter
from mor_ext.nn.routers.controls import FixedDepthRouter, RandomRouter
from mor_ext.nn.routers.expert_choice import ExpertChoiceRouter
from mor_ext.nn.routers.router import Router
from mor_ext.nn.routers.token_choice import TokenChoiceRouter

__all__ = [
    "ActionRouter",
    "ExpertChoiceRouter",
    "FixedDepthRouter",
    "RandomRouter",
    "Router",
    "TokenChoiceRouter",
]
