"""Search a folder for the images that look most like a query image.

    python examples/search_images.py outputs/default/NAME path/to/images query.jpg

The first argument is the folder of a run or of an export. Similarity is the cosine between the features of the trained encoder.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import hjepa


def main() -> None:
    """Print the paths of the nearest images with their cosine similarities, the nearest one first."""
    parser = argparse.ArgumentParser(description="Search a folder for the images that look most like a query image.")
    parser.add_argument("run", help="folder of a run or of an export")
    parser.add_argument("images", type=Path, help="folder to search, with its subfolders")
    parser.add_argument("query", type=Path, help="image to search for")
    parser.add_argument("--top", type=int, default=5, help="number of images to print")
    arguments = parser.parse_args()

    run = hjepa.load(arguments.run)
    features = run.features(arguments.images)  # a DataFrame: one row per image, indexed by its path
    query = run.features([arguments.query])
    similarity = F.cosine_similarity(torch.from_numpy(features.to_numpy()), query)
    for value, index in zip(*similarity.topk(min(arguments.top, len(features))), strict=True):
        print(f"{value:.3f}  {arguments.images / features.index[int(index)]}")


if __name__ == "__main__":
    try:
        main()
    except hjepa.UserError as error:
        raise SystemExit(str(error)) from None
