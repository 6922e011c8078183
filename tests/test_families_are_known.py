"""Tables that are by component or by part know those of every family."""

from __future__ import annotations

import pytest

from engines.pipelines.parts import PARTS
from engines.sessions.low_memory import stage
from export.build.quantized import STAYS_FLOAT
from export.build.tensorrt_plan import TOUCHED
from export.graph.components import GRAPHS
from export.side_by_side import SHARES
from sdkd.bundle.memory import _TENSORS
from sdkd.compare.measure.subjects import WEIGHT_FOLDERS
from sdkd.core.components import COMPONENTS, CONFIG_FOLDERS, CONTRACTS
from sdkd.core.numbers import NEEDED
from sdkd.families import FAMILIES, Family
from sdkd.models.families import CLASSES, EXPORTED
from sdkd.models.random_weights import _SEEDS


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_table_knows_a_family_s_components_and_parts(family: Family) -> None:
    texts = {encoder.part for encoder in family.text_encoders}
    components, parts = set(family.components), set(family.parts)
    for table in (COMPONENTS, CONFIG_FOLDERS, CONTRACTS, GRAPHS, SHARES, _TENSORS, NEEDED):
        assert components <= set(table)
    for table in (CLASSES, EXPORTED, PARTS, WEIGHT_FOLDERS, _SEEDS):
        assert parts <= set(table)
    assert components - {"unet"} <= set(STAYS_FLOAT)
    assert {"unet", *texts} <= set(TOUCHED)
    assert all(component in stage(component) for component in components)
    assert {CONFIG_FOLDERS[component] for component in components} == parts
