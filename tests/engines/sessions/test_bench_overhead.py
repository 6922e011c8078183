"""tools/bench_kit/overhead.py: a library's bare call computes what the session does, on every target of a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from engine_bundles import EVERY, unet_feeds

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from bench_kit.overhead import bare_call

from engines import open_session
from sdkd.bundle.manifest import Bundle


@pytest.mark.parametrize("target", EVERY)
def test_the_bare_call_is_the_sessions_own(graph: Bundle, target: str) -> None:
    feeds = unet_feeds()
    with open_session(graph, target, "unet") as session:
        expected = session.run(feeds)["out_sample"].clone()
        outputs = {"out_sample": torch.zeros_like(feeds["sample"])}
        found = bare_call(session, feeds, outputs)()
        torch.testing.assert_close(found[0] if target == "inductor" else outputs["out_sample"], expected)
