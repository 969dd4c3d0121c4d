"""Routes, settings, keys and links in docs/trainers exist."""

import re
from pathlib import Path

import pytest
import yaml

from shopr1_client.reward_logs import PREFIX, log_keys
from shopr1_rewards import load_recipe
from shopr1_service.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "trainers").glob("*.md"))
PATHS = set(yaml.safe_load((ROOT / "openapi.yaml").read_text("utf-8"))["paths"])

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@each_page
def test_links(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text("utf-8"))
    for file, anchor in links:
        target = page.parent / file if file else page
        assert target.exists(), file
        headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, anchor


@each_page
def test_routes(page: Path) -> None:
    named = set(re.findall(r"/dialects/[a-z_]+(?:/[a-z_0-9]+)*", page.read_text("utf-8")))
    # A base URL means all routes below it.
    assert [path for path in named if not any(f"{known}/".startswith(f"{path}/") for known in PATHS)] == []


def test_every_route_is_described() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert [path for path in PATHS if path.startswith("/dialects/") and Path(path).name not in text] == []


def test_every_setting_is_described() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    named = set(re.findall(r"\b[a-z_]+_unscorable\b", text))
    assert named == {name for name in Settings.model_fields if name.endswith("_unscorable")}


def test_every_key_is_described() -> None:
    text = (ROOT / "docs" / "trainers" / "README.md").read_text("utf-8")
    keys = log_keys(load_recipe("shop_r1").components)
    assert [key for key in keys if f"`{key.removeprefix(PREFIX)}`" not in text.replace(PREFIX, "")] == []
