"""The report as a reader sees it: in a real browser where there is one, and in the page's own text everywhere.

The page is complete without scripts, so every fact of `test_the_page_says` holds in any browser. Where a Chromium is
installed (or CHROMIUM names one), `test_a_reader_in_a_real_browser` clicks through the page in it; elsewhere it checks
that every element that the script reaches for is there, and says which of the two it did.
"""

import csv
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from results.__main__ import main
from results.aggregator.names import DATASET_CATEGORIES
from results.aggregator.render import record_id
from results.aggregator.report import page

QUERY = "model.init_args.query"
CATEGORIES = ("bolt", "gear", "tile")


def picture(colour):
    stream = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def site(runs_at, tmp_path_factory):
    """An ablation, a training on MVTec AD, heat maps, a conflict and a damaged record; (page text, folder)."""
    tmp_path = tmp_path_factory.mktemp("site")
    runs = runs_at(tmp_path / "runs")
    index = "dataset,category,rank,defect,image_score,file,caption\n"
    for category in CATEGORIES:
        index += "".join(f"synthetic,{category},{rank},scratch,{i + 1.5},{category}.jpg,x\n"
                         for i, rank in enumerate(("worst", "median", "best")))  # fmt: skip
    pictures = {
        f"heatmaps/{c}.jpg": picture(colour) for c, colour in zip(CATEGORIES, ("red", "green", "blue"), strict=True)
    }
    for i, query in enumerate(("none", "first", "layerwise")):
        for seed in (0, 1):
            kept = {**pictures, "heatmaps/index.csv": index} if (query, seed) == ("layerwise", 0) else None
            runs.add("components", {QUERY: query}, seed, value=[0.85, 0.95, 0.91][i] + 0.002 * seed,
                     backbone={"name": "tiny", "weights": "random"}, attachments=kept)  # fmt: skip
    runs.add("broken", {"a.b": 1}, 0)
    runs.add("broken", {"a.b": 1}, 1, image_size=(32, 32))
    runs.add(dataset="mvtec_ad", categories=DATASET_CATEGORIES["mvtec_ad"], value=0.97)
    damaged = runs.add("components", {QUERY: "none"}, 2)
    (damaged / "record.json").write_text("{")
    (tmp_path / "components.yaml").write_text(
        f"name: components\nmethod: grid\nparameters: {{{QUERY}: {{values: [none, first, layerwise]}}}}"
    )
    out = tmp_path / "report.html"
    assert main(["report", "--root", str(runs.root), "--sweeps", str(tmp_path), "--out", str(out)]) == 1
    return out.read_text(encoding="utf-8"), tmp_path


class Reader(html.parser.HTMLParser):
    """What a page shows and points to."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.sources, self.text, self.titles = [], [], [], [], []
        self.stack, self.sections = [], {}
        self.section = None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "link", "img", "br", "path", "use", "rect"):
            self.stack.append(tag)
        if attributes.get("id"):
            self.ids.append(attributes["id"])
            if tag == "h2":
                self.section = attributes["id"]
        self.links += [attributes["href"]] if tag == "a" else []
        self.sources += [value for key, value in attributes.items() if key in ("src", "srcset", "data") or (
            tag == "link" and key == "href")]  # fmt: skip
        self.titles += [attributes["title"]] if "title" in attributes else []

    def handle_data(self, data):
        if data.strip() and not ({"style", "script"} & set(self.stack[-1:])):
            self.text.append(data.strip())
            self.sections.setdefault(self.section, []).append(data.strip())

    def handle_endtag(self, tag):
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass


def read(text):
    reader = Reader()
    reader.feed(text)
    return reader


def test_the_page_needs_no_other_file_no_server_and_no_network(site):
    text, _ = site
    reader = read(text)
    assert reader.sources
    assert all(source.startswith("data:image/") for source in reader.sources)
    assert not re.search(r"url\((?!#|\"?data:)", text)
    assert "@import" not in text
    for pattern in ("fetch(", "XMLHttpRequest", "import("):
        assert pattern not in text


def test_the_page_says(site):
    text, _ = site
    reader = read(text)
    ablations = " ".join(reader.sections["ablations"])
    assert "95.1 ± 0.1" in ablations
    assert "RANDOM BACKBONE WEIGHTS" in ablations
    assert "Protocol clean, profile demo" in ablations
    assert "No table of broken: its records do not belong together" in ablations
    assert "image size differs" in ablations
    papers = " ".join(reader.sections["papers"])
    assert "97.0 (+0.5)" in papers, "ours beside the printed 96.5"
    assert all(f"ULSAD Table {number}," in papers for number in (1, 2, 3, *range(6, 24)))
    assert "65.12" in " ".join(reader.sections["audit"])
    gallery = " ".join(reader.sections["gallery"])
    for category in CATEGORIES:
        assert f"synthetic / {category} worst: scratch (1.5), median: scratch (2.5), best: scratch (3.5)" in gallery
    assert "RANDOM BACKBONE WEIGHTS" in gallery
    assert any(text.startswith("Damaged record, left out:") and "not readable JSON" in text for text in reader.text)
    assert "Protocol as_released" in " ".join(reader.sections["reading"])


def test_every_number_of_ours_leads_to_the_provenance_of_its_runs(site):
    text, _ = site
    reader = read(text)
    anchors = [link[1:] for link in reader.links if link.startswith("#")]
    assert not set(anchors) - set(reader.ids), "a link that leads nowhere"
    assert len(reader.ids) == len(set(reader.ids))
    hover = [title for title in reader.titles if "components/query=first-seed0" in title]
    assert hover
    assert "n = 2 seeds" in hover[0]
    assert "components/query=first-seed1" in hover[0]
    records = " ".join(reader.sections["records"])
    for part in ("components/query=first-seed1", "c0ffeec0ffee", "query=first", "max_epochs: 3", "f00df00d"):
        assert part in records
    assert any("cross-checked" in title for title in reader.titles), "how sure a printed number is"


def test_markup_in_names_and_notes_stays_text(runs):
    runs.add("s", {"a.b": "<script>alert(1)</script>"}, 0, run="x", notes=["<b>bold</b> & more"])
    text = page(runs.read(), Path("nowhere"))
    assert "<script>alert" not in text
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more" in text


def test_hostile_names_notes_and_categories_are_shown_as_they_are_written(runs):
    hostile = """<script>alert("1")</script> & 'x' "><img src=x onerror=alert(1)>"""
    index = io.StringIO()
    rows = csv.writer(index)
    rows.writerow(("dataset", "category", "rank", "defect", "image_score", "file", "caption"))
    rows.writerow((hostile, hostile, "worst", hostile, 1.5, "a.jpg", hostile))
    runs.add("s", {"a.b": hostile}, 0, categories=(hostile,), dataset=hostile, notes=[hostile], method=hostile,
             config=f"note: {hostile}", metrics={"version": hostile, "definitions": {hostile: hostile}},
             attachments={"heatmaps/a.jpg": picture("red"), "heatmaps/index.csv": index.getvalue()})  # fmt: skip
    stored = runs.read()
    for one in stored:  # a record refuses such a name, so the page is given it past the check
        vars(one)["name"] = f"s/{hostile}"
    text = page(stored, Path("nowhere"))
    reader = read(text)
    assert text.count("<script>") == 1
    assert all(source.startswith("data:image/") for source in reader.sources)
    for section, times in {"ablations": 1, "gallery": 4, "definitions": 3, "records": 6}.items():
        assert " ".join(reader.sections[section]).count(hostile) >= times, section
    assert any(f"s/{hostile}" in title for title in reader.titles)
    assert f"#{record_id(f's/{hostile}')}" in reader.links
    assert record_id(f"s/{hostile}") in reader.ids


def test_an_empty_folder_gives_a_page_that_says_what_to_do(tmp_path):
    assert main(["report", "--root", str(tmp_path / "none"), "--out", str(tmp_path / "r.html")]) == 0
    assert "No sweep has left a record yet" in (tmp_path / "r.html").read_text(encoding="utf-8")


PROBE = """
<script>
const out = {};
const visible = (e) => { const b = e.getBoundingClientRect(); return b.width > 0 && b.height > 0; };
const table = document.querySelector("#table-components table");
const column = (n) => [...table.tBodies[0].rows].map((r) => r.children[n].innerText);
out.before = column(0);
const heads = [...table.querySelectorAll("tr.heads th")];
heads[1].click(); out.descending = column(0); out.sortMark = heads[1].getAttribute("aria-sort");
heads[1].click(); out.ascending = column(0);
out.best = getComputedStyle(table.querySelector("strong")).fontWeight;
out.shout = document.querySelector("#table-components .shout").innerText;
const link = table.querySelector("td a"); link.click();
const origin = document.getElementById("origin");
out.origin = visible(origin) ? origin.innerText : "hidden";
const target = origin.querySelector("li a"); location.hash = target.getAttribute("href");
window.dispatchEvent(new Event("hashchange"));
const record = document.getElementById(target.getAttribute("href").slice(1));
out.recordOpen = record.open; out.record = record.innerText;
origin.querySelector("button").click(); out.closed = origin.hidden;
const images = [...document.querySelectorAll(".gallery img")];
images.forEach((i) => { i.loading = "eager"; });
out.wide = document.documentElement.scrollWidth <= innerWidth + 1;
out.figures = [...document.querySelectorAll("#ablations ~ figure img")].filter(visible).length;
out.groups = [...document.querySelectorAll("tr.groupname")].length;
Promise.all(images.map((i) => i.decode())).then(() => {
  out.images = images.map((i) => [i.naturalWidth, i.naturalHeight]);
  const pre = document.createElement("pre"); pre.id = "probe";
  pre.textContent = JSON.stringify(out); document.body.append(pre);
});
</script></body>"""


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
    named = os.environ.get("CHROMIUM")
    return named or next((found for found in map(shutil.which, names) if found), None)


def browse(text, folder, browser):
    """Load the page with the probe in a headless browser and return what the probe saw."""
    file = folder / "probe.html"
    file.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1280,1600", "--virtual-time-budget=10000", "--dump-dom",
        file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the probe did not run in {browser}: {done.stderr[-2000:]}"
    return json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_a_reader_in_a_real_browser_sorts_asks_for_provenance_and_sees_the_heat_maps(site, record_property):
    text, folder = site
    browser = chromium()
    record_property("browser", browser or "none: checked the page's text and the script's hooks")
    if browser is None:
        # The same facts from the page's text; the clicks cannot be made, so every element that they need must be there.
        reader = read(text)
        for hook in ("origin", "table-components", "gallery", "records"):
            assert hook in reader.ids
        table = text.split('id="table-components"')[1].split("</section>")[0]
        assert 'class="sortable"' in table
        assert '<tr class="heads">' in table
        assert re.findall(r'<td data-sort="([\d.]+)"', table)[::2] == ["85.1", "95.1", "91.1"]
        assert table.count("data-records=") == 6
        assert text.count("data:image/jpeg;base64,") == 3
        return
    saw = browse(text, folder, browser)
    assert saw["before"] == ["none", "first", "layerwise"]
    assert saw["descending"] == ["first", "layerwise", "none"]
    assert saw["sortMark"] == "descending"
    assert saw["ascending"] == ["none", "layerwise", "first"]
    assert int(saw["best"]) >= 600
    assert "RANDOM BACKBONE WEIGHTS" in saw["shout"]
    assert "components/query=none-seed0" in saw["origin"]
    assert "components/query=none-seed1" in saw["origin"]
    assert saw["recordOpen"] is True
    assert "c0ffeec0ffee" in saw["record"]
    assert saw["closed"] is True
    assert saw["images"] == [[60, 40]] * 3
    assert saw["wide"] is True, "the page must not scroll sideways"
    assert saw["figures"] >= 1


@pytest.mark.program
def test_a_printed_page_loses_no_column(site):
    """Every word of the PDF lies on its page, and the last column of the widest tables is among them."""
    text, folder = site
    browser = chromium()
    if browser is None or shutil.which("pdftotext") is None:
        pytest.skip("needs a Chromium and poppler's pdftotext")
    page_file, pdf = folder / "printed.html", folder / "printed.pdf"
    page_file.write_text(text, encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={folder / 'printing'}", "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page_file.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    boxes = subprocess.run(["pdftotext", "-bbox", str(pdf), "-"], capture_output=True, text=True, check=True).stdout
    width = float(re.search(r'<page width="([\d.]+)"', boxes).group(1))
    words = re.findall(r'<word xMin="([\d.-]+)" yMin="[\d.-]+" xMax="([\d.-]+)" yMax="[\d.-]+">(.*?)</word>', boxes)
    assert len(words) > 500
    assert [word for low, high, word in words if float(low) < 0 or float(high) > width] == []
    printed = {word for _, _, word in words}
    for head in ("I-AUROC", "P-AUROC", "recomputed", "difference"):
        assert head in printed
