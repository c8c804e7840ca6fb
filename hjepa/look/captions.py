"""What each kind of picture shows, in a sentence: said on the screen and in reports."""

CAPTIONS = {
    "curves": "Losses, probes beside the untrained network (dotted), and the collapse watch, by optimizer step.",
    "masks": "What the student sees, and the cells that each level predicts.",
    "predictions": "How near predictions come to the teacher's targets, cell by cell, on images that were not trained on.",
    "pca": "Patches of like colour are alike to the network: three principal components of patch features.",
    "attention": "Where the network looks, in the last block and through all of them.",
    "neighbours": "The most similar images by features of the trained network, of the untrained one, and by pixels.",
    "scatter": "Every image a point, near others of like features (t-SNE).",
}
