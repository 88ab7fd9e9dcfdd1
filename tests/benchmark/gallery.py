"""Tiles one moment of several films into one picture: what the scripts learn, at a glance.

Run: python tests/benchmark/gallery.py OUT.png TITLE=replay.mp4[@moment] …
moment: how far into the film, 0 to 1 (default 0.5).
"""

import sys

import imageio.v3 as iio
from matplotlib.figure import Figure


def main(out: str, *films: str) -> None:
    figure = Figure(figsize=(12, 4.2 * ((len(films) + 2) // 3)), layout="constrained")
    for axes, film in zip(figure.subplots((len(films) + 2) // 3, 3).flat, films, strict=False):
        title, _, path = film.partition("=")
        path, _, moment = path.partition("@")
        frames = iio.imread(path)
        axes.imshow(frames[int(float(moment or 0.5) * (len(frames) - 1))])
        axes.set_title(title, fontsize=15)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(out, dpi=70)


if __name__ == "__main__":
    main(*sys.argv[1:])
