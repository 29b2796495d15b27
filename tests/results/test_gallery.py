"""The page of all records: its files, and what Chromium makes of it, where that is installed."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from vlsm.data.records import Record
from vlsm.results.gallery import page_files, write_gallery

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pages(folder, count=12, runs=("one",)):
    """A gallery of noise: record 0 missed, record 1 a false alarm, the others ever better."""
    rng, records, kept = np.random.default_rng(0), [], {name: [] for name in runs}
    for i in range(count):
        truth = np.zeros((20, 30), bool)
        truth[5:15, 5:25] = i != 1
        image = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
        records.append(Record(f"r{i}</script><b>.png", f"r{i}.png", image, truth))
        for k, name in enumerate(runs):
            predicted = np.zeros_like(truth) if i == 0 else truth if i != 1 else ~truth
            dsc = 0.0 if i < 2 else (i - k * 0.5) / count
            kept[name].append(
                dict(dsc=dsc, hd95=float("nan") if i < 2 else 1.0, prompt=f"a \"thing\" {i % 3} <i>",
                     target_empty=i == 1, pred_empty=i == 0, packed_mask=np.packbits(predicted))
            )  # fmt: skip
    write_gallery(folder, records, kept, "a <title> & more")
    return folder / "index.html"


def test_files_and_data(tmp_path):
    page = pages(tmp_path / "g", runs=("one", "two"))
    written = {p for p in (tmp_path / "g").rglob("*") if p.is_file() and p.name != ".vlsm-written"}
    assert written == set(page_files(tmp_path / "g")) and len(written) == 1 + 12 * (2 + 2 * 2)
    text = page.read_text()
    assert "<title>a &lt;title&gt; &amp; more</title>" in text and "http" not in text.replace(
        "http://www.w3.org", ""
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["runs"] == ["one", "two"] and len(data["records"]) == 12
    assert data["records"][0]["scores"][0] == dict(dsc=0.0, hd95=None, missed=True, alarm=False)
    assert data["records"][1]["empty"] and data["records"][1]["scores"][1]["alarm"]
    layer = np.asarray(Image.open(tmp_path / "g" / "thumbs" / "00001-d0.png").convert("RGBA"))
    assert layer[0, 0].tolist() == [230, 159, 0, 255], "too much, where the truth is empty"
    layer = np.asarray(Image.open(tmp_path / "g" / "thumbs" / "00000-d0.png").convert("RGBA"))
    assert layer[10, 10].tolist() == [0, 114, 178, 255] and layer[0, 0, 3] == 0, "missed; and nothing"


def browse(page, fragment=""):
    """The page's elements, as Chromium has made them."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    done = subprocess.run([*command, f"file://{page}{fragment}"], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt install chromium)")
def test_in_a_browser(tmp_path):
    page = pages(tmp_path / "g")
    shown = browse(page)
    assert shown.count("<article") == 12 and 'data-ready="' in shown
    names = re.findall(r"<span>(r\d+)&lt;/script&gt;", shown)
    assert names[:2] == ["r0", "r1"] and names[2:4] == ["r2", "r3"], "worst first, and names are no markup"
    assert "12 of 12 records. one: DSC" in shown and '<span class="tag">missed</span>' in shown
    assert browse(page, "#filter=alarm").count("<article") == 1
    assert browse(page, "#filter=empty&sort=best").count("<article") == 1
    assert browse(page, "#search=r11").count("<article") == 1
    opened = browse(page, "#sort=best&open=11")
    assert re.search(r"<dialog[^>]* open", opened) and "thumbs/00011-d0.png" in opened
    two = browse(pages(tmp_path / "h", runs=("one", "two")), "#sort=apart&open=3")
    assert "prediction: two" in two and "one: DSC" in two and "two: DSC" in two


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt install chromium)")
def test_a_thousand_records(tmp_path):
    shown = browse(pages(tmp_path / "g", 1000))
    assert shown.count("<article") == 1000 and 'data-ready="' in shown


def test_from_the_command_line(cli, trained, tmp_path):
    code, said, err = cli("evaluate", "--ckpt", trained, "--gallery")
    assert code == 0 and "gallery/index.html" in said, err
    folder = trained / "eval-test" / "gallery"
    assert len(list((folder / "thumbs").glob("*.jpg"))) == 6
    out = tmp_path / "two.png"
    code, said, err = cli("vlsm.tools.compare", trained, trained, "--gallery", "--out", out)
    assert code == 0 and (tmp_path / "two" / "gallery" / "index.html").is_file(), err
    (tmp_path / "mine" / "gallery").mkdir(parents=True)
    (tmp_path / "mine" / "gallery" / "index.html").write_text("mine")
    code, _, err = cli("evaluate", "--ckpt", trained, "--gallery", "--out", tmp_path / "mine")
    assert code == 2 and "index.html" in err and (tmp_path / "mine/gallery/index.html").read_text() == "mine"
    assert cli("train", "--resume", "--out", trained, "--overwrite")[0] == 2
