"""Draw scripts/figures/report.png: a part of the page of a run, as a browser shows it.

python scripts/draw_report.py runs/quickstart

Needs Chromium or Chrome and Pillow (`pip install pillow`). Shown are the main numbers, two curves,
the routing and the experts of the first linears; what else the page holds is hidden here.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from qd2mora.inspection import inspect_where_due
from qd2mora.report import read_run
from qd2mora.report.run_page import run_page

FIGURE = Path(__file__).parent / "figures" / "report.png"
WIDTH, HEIGHT = 1080, 4000
MOST_BYTES = 200_000
# Sections by their place: Run, Training, Memory, Scores, Export, Routing, Experts, Samples.
HIDDEN = """
nav, #s0 .grid:not(.tiles), #s0 .tile:nth-child(n+6), details, #s1 .card:nth-child(n+3), #s2, #s3, #s4,
#s5 .maps .card:nth-child(n+5), #s5 .grid:not(.maps), #s6 .grid:not(.small), #s6 .card:nth-child(n+5), #s7, footer
{ display: none; }
h2 { margin-top: 14px; }
#s6 .small { grid-template-columns: repeat(4, 1fr); }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    run = parser.parse_args().run
    inspect_where_due(run)
    page = run_page(read_run(run)).replace("</style>", HIDDEN + "</style>", 1)
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no Chromium or Chrome on the path")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "page.html").write_text(page, encoding="utf-8")
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder / 'profile'}", "--blink-settings=preferredColorScheme=1"]
        command += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={folder / 'page.png'}"]
        subprocess.run([*command, (folder / "page.html").as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(folder / "page.png") as picture:
            shown = picture.convert("RGB")
    ground = Image.new("RGB", shown.size, shown.getpixel((0, shown.height - 1)))
    bottom = _last_row(shown, ground) + 24
    page_only = shown.crop((0, 0, WIDTH, bottom))
    page_only.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(FIGURE, optimize=True)
    size = FIGURE.stat().st_size
    print(f"{FIGURE}: {WIDTH} x {bottom}, {size:,} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"over {MOST_BYTES:,} bytes")


def _last_row(shown: Image.Image, ground: Image.Image) -> int:
    """Return the last row that is not ground."""
    box = ImageChops.difference(shown, ground).getbbox()
    assert box is not None
    return box[3]


if __name__ == "__main__":
    main()
