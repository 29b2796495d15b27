"""The page of all records: its files, and what Chromium makes of it, where that is installed."""

import csv
import html
import io
import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlsm.data.records import Record
from vlsm.results import gallery
from vlsm.results.gallery import page_files, write_gallery

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt install chromium)")
EVIL = "=r{}</script><b>.png"  # a formula for spreadsheets, and markup


def make_page(folder, count=12, runs=("one",), side=20, **settings):
    """A gallery of noise: record 0 missed, record 1 a false alarm, the others ever better, and ever larger."""
    rng = np.random.default_rng(0)
    records = []
    kept = {name: [] for name in runs}
    for i in range(count):
        truth = np.zeros((side, side * 3 // 2), bool)
        truth[: max(1, side * i // count), 5 : side - 3] = i != 1
        image = rng.integers(0, 256, (*truth.shape, 3)).astype(np.uint8)
        name = EVIL.format(i)
        records.append(Record(name, f"m{i}.png", image, truth))
        for k, run in enumerate(runs):
            predicted = np.zeros_like(truth) if i == 0 else truth if i != 1 else ~truth
            dsc = 0.0 if i < 2 else (i + k * (6 - i)) / count
            row = dict(
                image=name, mask=f"m{i}.png", group=f"patient {i // 4}", prompt=f'a "thing" {i % 3} <i>'
            )
            row["class"] = ("polyp", "tool")[i % 2]
            row.update(dsc=dsc, iou=dsc / 2, nsd=dsc, hd95=float("nan") if i < 2 else 1.0, diagonal=36.0)
            row.update(unit="mm", target_empty=i == 1, pred_empty=i == 0, packed_mask=np.packbits(predicted))
            kept[run].append(row)
    write_gallery(folder, records, kept, "a <title> & more", ["prompts: <p1>"], **settings)
    return folder / "index.html"


def chromium(page, *options, fragment=""):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *options]
    profile = f"--user-data-dir={page.parent.parent / 'profile'}"
    url = f"file://{page}{fragment}"
    return subprocess.run([*command, profile, url], capture_output=True, text=True, timeout=120).stdout


def browse(page, fragment=""):
    """The page's elements, as Chromium has made them."""
    return chromium(page, "--virtual-time-budget=3000", "--dump-dom", fragment=fragment)


HELPERS = """
// Virtual time stands still while an image is read, so that the browser's other processes have real time.
const tick = n => new Promise(resolve => { const image = new Image(); image.onload = resolve; image.src = "thumbs/00000.jpg?" + n; });
const until = async done => { for (let n = 0; n < 200 && !done(); n++) await tick(n); };
const wait = async () => { for (let n = 0; n < 10; n++) await tick(n); };
const names = () => [...document.querySelectorAll("#cards .name")].map(b => Number(b.textContent.match(/\\d+/)[0]));
const key = (k, more) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true, ...more}));
const choose = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); return names(); };
"""


def act(page, script, fragment=""):
    """Run a script in a copy of the page, after it was loaded; returns the list that it calls `results`."""
    program = f"""<script>{HELPERS}
    addEventListener("load", async () => {{
      const results = [];
      try {{ {script} }} catch (error) {{ results.push("error: " + error); }}
      document.body.dataset.results = JSON.stringify(results);
    }});</script></html>"""
    copy = page.with_name("copy.html")
    copy.write_text(page.read_text().replace("</html>", program))
    shown = chromium(copy, "--virtual-time-budget=20000", "--dump-dom", fragment=fragment)
    return json.loads(html.unescape(re.search(r'data-results="(.*?)"', shown)[1]))


# Files


def test_files_and_data(tmp_path):
    page = make_page(tmp_path / "g", runs=("one", "two"))
    written = {p for p in (tmp_path / "g").rglob("*") if p.is_file() and p.name != ".vlsm-written"}
    assert written == set(page_files(tmp_path / "g")) and len(written) == 1 + 12 * (2 + 2 * 2)
    text = page.read_text()
    assert (
        "<title>a &lt;title&gt; &amp; more</title>" in text and "prompts: &lt;p1&gt;; evaluated on 20" in text
    )
    assert "http" not in text and "src=" not in text.split("<script>")[0], "the page needs no other file"
    assert text.count("</script>") == 2, "names of files end no script"
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["runs"] == ["one", "two"] and len(data["records"]) == 12
    first = data["records"][0]
    assert (
        first["original"] is None and first["scores"][0]["hd95"] is None and first["scores"][0]["pred_empty"]
    )
    assert data["records"][1]["scores"][1]["target_empty"]
    assert data["summaries"][0]["hd95"]["n_undefined"] == 2 and len(data["summaries"][0]["dsc"]["ci95"]) == 2


def test_layers(tmp_path):
    """An area is half transparent, its contour opaque, the rest transparent."""
    make_page(tmp_path / "g", side=60)
    thumbs = tmp_path / "g" / "thumbs"
    too_much = np.asarray(Image.open(thumbs / "00001-d0.png").convert("RGBA"))
    assert too_much[30, 45].tolist() == [*gallery.TOO_MUCH, gallery.FILL]
    assert too_much[0, 45].tolist() == [*gallery.TOO_MUCH, 255], "at the image's border the contour closes"
    hit = np.asarray(Image.open(thumbs / "00011-d0.png").convert("RGBA"))
    assert hit[30, 30].tolist() == [*gallery.HIT, gallery.FILL] and hit[30, 70, 3] == 0
    missed = np.asarray(Image.open(thumbs / "00000-d0.png").convert("RGBA"))
    assert missed[0, 30].tolist() == [*gallery.MISSED, 255] and not missed[30:, :, 3].any()


def test_originals(tmp_path, monkeypatch):
    """Zoom has the original's pixels: the file itself, by a relative address, or a copy with `full`."""
    page = make_page(tmp_path / "full", 2, side=40, full=True)
    assert {p.name for p in page.parent.glob("thumbs/00001*")} == {
        f"00001{end}" for end in (".jpg", "-full.png", "-truth.png", "-truth-full.png", "-p0.png", "-p0-full.png",
                                  "-d0.png", "-d0-full.png")
    }  # fmt: skip
    monkeypatch.setattr(gallery, "SIDE", 15)
    page = make_page(tmp_path / "small", 2, side=40, full=True)
    sizes = [
        Image.open(page.parent / "thumbs" / f"00001{end}.png").size for end in ("-full", "-d0-full", "-d0")
    ]
    assert sizes == [(60, 40), (60, 40), (15, 10)]

    source = tmp_path / "data" / "a b#1%.png"
    source.parent.mkdir()
    Image.new("RGB", (3, 3)).save(source)
    assert gallery._relative_url(source, tmp_path / "run" / "gallery") == "../../data/a%20b%231%25.png"
    assert gallery._relative_url(tmp_path / "volume.tif", tmp_path) is None, "no browser shows it"
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "deep.png")
    assert gallery._relative_url(tmp_path / "deep.png", tmp_path) is None, "a browser shows it black"
    assert gallery._relative_url(np.zeros((2, 2, 3)), tmp_path) is None


# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB
VISION = dict(
    normal=np.eye(3),
    protanope=[[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    deuteranope=[[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
)  # fmt: skip
TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]


def lab(rgb, vision):
    """A colour of 0 to 255 in CIELAB, as one sees it."""
    share = np.array(rgb) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    linear = (np.array(VISION[vision]) @ linear).clip(0, 1)
    ratio = np.array(TO_XYZ) @ linear / [0.95047, 1, 1.08883]
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("below", [(200, 110, 90), (128, 128, 128)], ids=["mucosa", "grey"])
def test_colours_of_the_difference(vision, below):
    page = Path(gallery.__file__).with_suffix(".html").read_text()
    opacity = int(re.search(r'id="opacity"[^>]* value="(\d+)"', page)[1]) / 100
    colours = []
    for colour in (gallery.HIT, gallery.TOO_MUCH, gallery.MISSED):
        blended = opacity * np.array(colour) + (1 - opacity) * np.array(below)
        colours.append(lab(blended, vision))
    assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) >= 25


# In a browser


@needs_chromium
def test_in_a_browser(tmp_path):
    page = make_page(tmp_path / "g")
    shown = browse(page)
    assert shown.count("<article") == 12 and 'data-ready="' in shown
    names = re.findall(r'class="name">=(r\d+)&lt;/script&gt;', shown)
    assert names[:4] == ["r0", "r1", "r2", "r3"], "worst first, and names are no markup"
    assert "12 of 12 records; mean DSC" in shown and '<span class="tag">nothing predicted</span>' in shown
    assert "undefined (the true mask is empty)" in shown and "undefined (nothing was predicted)" in shown
    assert "<b>1.0 mm</b>" in shown and re.search(r"mean DSC \d+\.\d+ \[\d+\.\d+, \d+\.\d+\] %", shown)
    assert "(undefined for 2: one of the two masks is empty)" in shown
    odd = browse(page, "#filter=alarm&sort=nonsense&bin=-3&open=99")
    assert odd.count("<article") == 1 and not re.search(r"<dialog[^>]* open", odd)
    opened = browse(page, "#sort=best&open=11")
    assert re.search(r"<dialog[^>]* open", opened) and "11 of 12" not in opened and "1 of 12" in opened


@needs_chromium
def test_closing_keeps_the_place(tmp_path):
    """The button, Back, a click outside: the page does not move, and the card has the focus again."""
    page = make_page(tmp_path / "g", 60)
    script = """
      scrollTo(0, 2000); await wait();
      const card = $("cards").children[40];
      const name = card.querySelector("button").textContent;  // a button: Space and Enter press it
      const area = $("detail");
      const closings = [() => $("close").click(), () => history.back(),
        () => area.dispatchEvent(new MouseEvent("click", {bubbles: true, clientX: 1, clientY: 1}))];
      for (const close of closings) {
        card.querySelector("button").click(); await wait();
        results.push(area.open, location.hash);
        close(); await until(() => !location.hash && !area.open);
        results.push([scrollY, document.activeElement.textContent === name, area.open, location.hash]);
      }
      card.querySelector("button").click(); await wait();
      for (let k = 0; k < 15; k++) key("ArrowRight");
      key("ArrowLeft"); await wait();
      $("close").click(); await until(() => !location.hash);
      const box = document.activeElement.closest("article").getBoundingClientRect();
      results.push(document.activeElement === $("cards").children[54].querySelector("button"), box.top > 0 && box.bottom <= innerHeight);
      location.hash = "open=5"; await wait();
      results.push($("heading").textContent, area.open);
      area.dispatchEvent(new MouseEvent("click", {bubbles: true, clientX: innerWidth / 2, clientY: innerHeight / 2}));
      results.push(area.open);"""
    results = act(page, script)
    for k in range(0, 9, 3):
        assert results[k : k + 3] == [True, "#open=40", [2000, True, False, ""]], f"closing {k // 3}"
    assert results[9:] == [True, True, EVIL.format(5), True, True]


@needs_chromium
def test_keys_and_zoom(tmp_path):
    page = make_page(tmp_path / "g")
    script = """
      const zoom = () => ["zoom", "x"].map(name => Number($("large").style.getPropertyValue("--" + name)));
      key("?"); results.push($("keys").open); $("keys").close();
      key("ArrowRight"); key("j"); results.push(document.activeElement.closest("article") === $("cards").children[1]);
      document.activeElement.click();
      key("+"); results.push(zoom());
      key("ArrowRight", {shiftKey: true}); results.push(zoom()[1]);
      key("0"); results.push(zoom());
      $("closer").click(); $("closer").click(); results.push(zoom()[0]);
      const box = document.querySelectorAll("#large .stack")[1].getBoundingClientRect();
      $("large").querySelector(".stack").dispatchEvent(new WheelEvent("wheel", {deltaY: 4000, bubbles: true, cancelable: true}));
      results.push(zoom());
      const seen = () => [".predicted", ".instead"].map(name => getComputedStyle($("large").querySelector(name)).visibility);
      key("b"); results.push(seen()); dispatchEvent(new KeyboardEvent("keyup", {key: "b"})); results.push(seen());
      key("c"); results.push($("alpha").getAttribute("tableValues")); key("c");
      key("["); results.push($("alpha").getAttribute("tableValues"));
      $("characters").checked = false; key("+"); results.push(zoom()[0]);"""
    assert act(page, script) == [
        True, True, [1.5, -0.25], -0.375, [1, 0], 2.25, [1, 0],
        ["hidden", "visible"], ["visible", "hidden"], "0 0 1", "0 0.4 1", 1,
    ]  # fmt: skip


@needs_chromium
def test_choosing(tmp_path):
    page = make_page(tmp_path / "g")
    script = """
      results.push(choose("class", "tool").length); choose("class", "");
      results.push(choose("group", "patient 1")); choose("group", "");
      results.push([...$("size").options].map(option => option.textContent).slice(1));
      results.push(["small", "medium", "large"].map(size => choose("size", size))); choose("size", "");
      results.push(["missed", "alarm", "empty"].map(filter => choose("filter", filter))); choose("filter", "all");
      const bars = [...$("histogram").children];
      choose("class", "tool");
      results.push(bars.map(bar => bar.disabled ? `${bar.textContent}empty ${bar.lastChild.clientHeight}` : bar.textContent));
      choose("class", "");
      results.push(bars.every(bar => bar.clientWidth >= 24 && bar.clientHeight >= 24), $("axis").textContent);
      bars[0].click(); results.push(names(), location.hash, bars[0].getAttribute("aria-pressed"));
      choose("class", "tool"); results.push(names()); $("clear").click(); results.push(names().length, location.hash);
      choose("search", "nobody"); results.push(document.querySelector("main").textContent);"""
    results = act(page, script)
    assert results[:2] == [6, [4, 5, 6, 7]]
    assert results[2][1].startswith("medium: ") and results[2][1].endswith("% of the image")
    assert results[3] == [[0, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], "thirds of those that show something"
    assert results[4] == [[0], [1], [1]]
    bars = ["1", "empty 0", "1", "empty 0", "1", "1", "empty 0", "1", "empty 0", "1"]
    assert results[5] == bars, "a bin of nothing has no bar and cannot be clicked"
    assert results[6:8] == [True, "050100 %"]
    assert results[8:11] == [[0, 1], "#bin=0", "true"]
    assert results[11:14] == [[1], 12, ""]
    assert results[14].startswith("No record fits this choice.")


@needs_chromium
def test_two_runs(tmp_path):
    """The difference of any two runs has a sign, and orders both ways."""
    page = make_page(tmp_path / "g", runs=("one", "two", "three"))
    script = """
      const first = () => document.querySelector("#cards .gain").textContent;
      results.push(choose("sort", "gain").slice(0, 3), first(), choose("sort", "loss").slice(0, 3), first());
      choose("b", "2"); results.push(first(), new URLSearchParams(location.hash.slice(1)).get("b"));
      choose("a", "2"); choose("b", "0"); results.push(choose("sort", "gain")[0], first());
      results.push(document.querySelectorAll("article")[0].querySelectorAll("figure").length);"""
    assert act(page, script) == [
        [11, 10, 9], "DSC of A − B: +41.7 points", [2, 3, 4], "DSC of A − B: −33.3 points",
        "DSC of A − B: −66.7 points", "2", 2, "DSC of A − B: +66.7 points", 8,
    ]  # fmt: skip


@needs_chromium
def test_table_for_other_programs(tmp_path):
    page = make_page(tmp_path / "g")
    script = """
      choose("class", "tool"); results.push(csv());
      HTMLAnchorElement.prototype.click = function () { results.push(this.download, this.href.startsWith("blob:")); };
      $("save").click();
      results.push(["-1", "+a", "@b", "\\tc", 'say "x", y', -1, 0.5].map(cell));"""
    table, *saved, cells = act(page, script)
    assert saved == ["records.csv", True]
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["mask"] for row in rows] == [f"m{i}.png" for i in (1, 3, 5, 7, 9, 11)], "in the order shown"
    assert rows[0]["image"] == "'" + EVIL.format(1) and rows[0]["hd95"] == "" and rows[1]["hd95"] == "1"
    assert (
        rows[1]["prompt"] == 'a "thing" 0 <i>'
        and float(rows[1]["dsc"]) == 0.25
        and rows[1]["class"] == "tool"
    )
    assert cells == ["'-1", "'+a", "'@b", "'\tc", '"say ""x"", y"', "-1", "0.5"]


@needs_chromium
def test_print(tmp_path):
    """All images of 60 records are loaded with the page, so that they are in its print."""
    page = make_page(tmp_path / "g", 60)
    script = """
      const images = [...document.querySelectorAll("#cards img")];
      results.push(images.length, images.filter(image => image.complete && image.naturalWidth).length);"""
    assert act(page, script) == [60 * 7, 60 * 7]
    pdf = tmp_path / "page.pdf"
    chromium(page, f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    assert content.count(b"/DCTDecode") == 60, "the small images are JPEGs"
    assert content.count(b"/Type /Page\n") > 10


@needs_chromium
def test_moved_original(tmp_path):
    """Where an original is missing, the small image takes its place, and the page says so."""
    page = make_page(tmp_path / "g", 3, side=400, full=True)
    (page.parent / "thumbs" / "00002-full.png").unlink()
    script = """
      const source = () => [...document.querySelectorAll("#large img")][0].src.split("/").at(-1);
      open(1); await wait(); results.push(source(), $("source").textContent);
      open(2); await wait(); results.push(source(), $("source").textContent);"""
    results = act(page, script)
    assert results[0] == "00001-full.png" and results[1] == "600 x 400 pixels. original image"
    assert results[2] == "00002.jpg" and "not where it was" in results[3]


@pytest.mark.slow
@needs_chromium
def test_a_thousand_records(tmp_path):
    shown = browse(make_page(tmp_path / "g", 1000))
    assert shown.count("<article") == 1000 and 'data-ready="' in shown


def test_from_the_command_line(cli, trained, tmp_path):
    code, said, err = cli("evaluate", "--ckpt", trained, "--gallery")
    assert code == 0 and "gallery/index.html" in said, err
    folder = trained / "eval-test" / "gallery"
    assert len(list((folder / "thumbs").glob("*.jpg"))) == 6 and not list(
        folder.glob("thumbs/?????-full.png")
    )
    text = (folder / "index.html").read_text()
    assert "prompts: random; foreground: probability above 0.5; NSD within 2 px; evaluated on " in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert all((folder / record["original"]).resolve().is_file() for record in data["records"])
    stored = json.loads((trained / "eval-test" / "metrics.json").read_text())
    assert data["summaries"][0]["dsc"] == stored["dsc"], (
        "the page has the means and intervals of metrics.json"
    )

    code, _, err = cli("evaluate", "--ckpt", trained, "--gallery", "--gallery-full")
    assert code == 0 and len(list(folder.glob("thumbs/?????-full.png"))) == 6, err
    code, _, err = cli("evaluate", "--ckpt", trained, "--gallery-full")
    assert code == 2 and "--gallery-full has an effect only with --gallery" in err

    out = tmp_path / "two.png"
    code, said, err = cli("vlsm.tools.compare", trained, trained, "--gallery", "--out", out)
    assert code == 0 and (tmp_path / "two" / "gallery" / "index.html").is_file(), err
    (tmp_path / "mine" / "gallery").mkdir(parents=True)
    (tmp_path / "mine" / "gallery" / "index.html").write_text("mine")
    code, _, err = cli("evaluate", "--ckpt", trained, "--gallery", "--out", tmp_path / "mine")
    assert code == 2 and "index.html" in err and (tmp_path / "mine/gallery/index.html").read_text() == "mine"
    assert cli("train", "--resume", "--out", trained, "--overwrite")[0] == 2
