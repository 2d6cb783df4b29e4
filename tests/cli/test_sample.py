"""sample: one figure, which the seed and the number of images determine."""

from helpers.command_line import pyro_vae


def test_sample(run):
    drawn = (run / "figures" / "samples.png").read_bytes()
    status, out, err = pyro_vae("sample", run)
    assert (status, out, err) == (0, f"{run / 'figures' / 'samples.png'}\n", "")
    assert (run / "figures" / "samples.png").read_bytes() == drawn  # train draws the same number, with seed 0
    for arguments in (["--seed", 1], ["--num-samples", 3]):
        pyro_vae("sample", run, *arguments)
        assert (run / "figures" / "samples.png").read_bytes() != drawn
        drawn = (run / "figures" / "samples.png").read_bytes()
