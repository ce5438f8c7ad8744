"""The study as text: the verdict."""

from helpers import study_of, write_run
from lab.study.analysis.tables import verdict


def test_verdict_names_the_winner_the_margin_and_the_controller(tmp_path):
    for seed, noise in enumerate((-0.1, 0.0, 0.1)):
        write_run(tmp_path, f"s{seed}", (1.0, 2.0, 90 + noise), 10.0, training__seed=seed)
        write_run(
            tmp_path,
            f"d{seed}",
            (1.0, 2.0, 89 + noise),
            20.0,
            training__seed=seed,
            ast__mode="dense",
        )
    text = verdict(study_of(tmp_path))
    assert text.startswith(
        "ast has the highest final accuracy: 90.00 ± 0.25 % (3 seeds). It beats dense by "
        "1.00 ± 0.23"
    )
    assert "It beats dense training of every length: its time to match is < 0.50." in text
    assert "Activation was at most 0.000 off its target" in text
    assert "dense loses to ast by 1.00 ± 0.23 points." in verdict(
        study_of(tmp_path, baseline="ast")
    )
    write_run(tmp_path, "best", (1.0, 2.0, 99.0), 60.0, ast__mode="dense", training__epochs=9)
    text = verdict(study_of(tmp_path))
    assert (
        "dense epochs=9 has the highest final accuracy: 99.00 % (1 seed). ast epochs=3 is "
        "9.00 points below dense"
    ) in text
