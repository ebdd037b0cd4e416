"""Everything at inference takes every kind of network of the second paper."""

import numpy as np
import pytest

from network import family_weights
from network.family_weights import KINDS
from poolformer_jax import GradCam, ImageClassifier, ImageEmbedder
from small_networks import PHOTOGRAPHS, PROCESSOR


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_classified_embedded_and_explained(kind):
    config = family_weights.config("sail", f"{kind}_tiny")
    variables = family_weights.variables("sail", config, "float32")
    folded, trained = (
        ImageClassifier(config, variables, PROCESSOR, batch_size=2, fold_parameters=fold)(PHOTOGRAPHS[0], top_k=10)
        for fold in (True, False)
    )
    assert [prediction.label for prediction in folded] == [prediction.label for prediction in trained]
    probabilities = [prediction.probability for prediction in folded]
    np.testing.assert_allclose(probabilities, [prediction.probability for prediction in trained], rtol=1e-4)
    explanation = GradCam(config, variables, PROCESSOR)(PHOTOGRAPHS[0])
    assert f"class {explanation.label}" == folded[0].label
    np.testing.assert_allclose(explanation.probability, probabilities[0], rtol=1e-4)
    embedding = ImageEmbedder(config, variables, PROCESSOR, batch_size=2)(PHOTOGRAPHS[0])
    assert embedding.features.shape == (config.hidden_sizes[-1],)
