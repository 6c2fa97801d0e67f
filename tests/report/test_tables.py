"""Tables of results."""

import pandas as pd
import pytest
from markdown_tables import unpadded

from step_trl.report import latex_table, markdown_table


@pytest.fixture
def tables():
    vanilla = pd.DataFrame(
        {
            "accuracy": [0.5, 0.25], "accuracy_low": [0.4, 0.2], "accuracy_high": [0.6, 0.3],
            "tokens": [1234.5, 1234.5], "tokens_low": [1000, 1000], "tokens_high": [1500, 1500],
        },
        index=["aime|24", "overall"],
    )  # fmt: skip
    ours = vanilla.assign(cr=0.5, cr_low=0.4, cr_high=0.6, aes=float("nan"), aes_low=0.0, aes_high=0.0)
    return {"vanilla": vanilla, "ours_50%": ours}


def test_markdown(tables):
    assert unpadded(markdown_table(tables)).splitlines() == [
        "| | aime\\|24 Acc | aime\\|24 Tok | overall Acc | overall Tok | overall CR | overall AES |",
        "|:---|---:|---:|---:|---:|---:|---:|",
        "| vanilla | 50.0 | 1,234 | 25.0 | 1,234 | | |",
        "| ours_50% | 50.0 | 1,234 | 25.0 | 1,234 | 0.50 | – |",
    ]
    assert "50.0 ± 10.0 | 1,234 ± 250" in unpadded(markdown_table(tables, intervals=True))


def test_latex(tables):
    text = latex_table(tables)
    assert r"\multicolumn{2}{c}{aime|24}" in text and r"ours\_50\% & 50.0 & 1,234" in text
    assert r"\toprule" in text
