"""The doctor on broken input: whatever it is handed, a report of findings, each with what helps."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fuzzing import broken_bytes, check_words, count_of, forms, fuzz, outcome
from hypothesis import strategies as st
from rich.console import Console
from test_fuzz_checkpoints import USED, damage, damaged
from test_fuzz_configs import METHODS, changed_trees, valid_trees
from test_fuzz_rows import ROW, lines_of
from test_fuzz_templates import TEMPLATE

from understudy import RunConfig
from understudy.doctor.catalogue import diagnose
from understudy.doctor.page import page
from understudy.preflight import Method
from user import bpe_tokenizer, save_model, tree, write_rows

TRAINING = st.sampled_from(["distill", "rl", "sft"])
