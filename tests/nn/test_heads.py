import jax
import numpy as np

from vrdistill_jax.nn.heads import DropoutHead


def test_a_head_is_two_normed_layers_and_an_output():
    x = np.random.default_rng(0).normal(size=(3, 2, 8, 6)).astype(np.float32)
    mask = np.broadcast_to(np.arange(8) < 6, (1, 2, 8))
    head = DropoutHead(6, 4, 0.5)
    variables = head.init(jax.random.key(0), x, mask, train=False)
    params = variables["params"]
    assert "bias" not in params["layer0"]["dense"]
    plain = DropoutHead(6, 4, 0.0)
    got, updates = plain.apply(variables, x, mask, train=True, mutable=["batch_stats"])
    expected = x[:, :, :6].reshape(-1, 6)
    for n in (0, 1):
        expected = expected @ np.asarray(params[f"layer{n}"]["dense"]["kernel"])
        if n == 0:  # statistics mix all leading axes, without pads
            stats = updates["batch_stats"]["layer0"]["norm"]
            np.testing.assert_allclose(stats["mean"], expected.mean(0), atol=1e-5)
        expected = np.maximum((expected - expected.mean(0)) / np.sqrt(expected.var(0) + 1e-5), 0)
    expected = expected @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
    np.testing.assert_allclose(got[:, :, :6].reshape(-1, 4), expected, atol=1e-4)

    def dropped(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return head.apply(variables, x, mask, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    assert np.abs(dropped(0) - dropped(1)).max() > 0.01
    np.testing.assert_array_equal(
        head.apply(variables, x, mask, train=False), plain.apply(variables, x, mask, train=False)
    )
