import json

from fairseq_hyperrouter.analysis.sweep import markdown, write


def rows():
    for label, top_ks in (("a", (1, 2)), ("b", (2, 4)), ("stock", (None,))):
        for k in top_ks:
            numbers = {"perplexity": 10.0 + (k or 0), "bits_per_token": 3.5, "bits_per_character": 1.5}
            numbers.update(top_p=None, threshold=None, mean_top_k=k)
            costs = {"tokens_per_second": 1234.5, "active_parameters": 1000 * (k or 1), "flops_per_token": 2.5e6}
            yield {"label": label, "top_k": k, **numbers, **costs}


def test_table_of_several_and_files(tmp_path):
    found = list(rows())
    side_by_side, detail = markdown(found).split("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in side_by_side.splitlines()]
    assert cells[0] == ["perplexity at k =", "1", "2", "4", "dense"]
    assert cells[2:] == [
        ["a", "11.00", "12.00", "", ""],
        ["b", "", "12.00", "14.00", ""],
        ["stock", "", "", "", "10.00"],
    ]
    assert len(detail.splitlines()) == 2 + 5
    assert markdown(found[:2]).count("\n\n") == 0  # one model needs no second table
    assert [path.name for path in write(found, tmp_path / "new")] == ["sweep.json", "sweep.md", "sweep.png"]
    assert json.loads((tmp_path / "new" / "sweep.json").read_text()) == found
    assert (tmp_path / "new" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_other_ways_to_choose_k(tmp_path):
    """Limits and lists of k per layer are rows and curves of their own; for limits the table says the mean k."""
    first = next(rows())
    limited = {**first, "top_k": 4, "top_p": 0.9, "mean_top_k": 1.75}
    above = {**first, "top_k": 4, "threshold": 0.05, "mean_top_k": 2.5}
    listed = {**first, "top_k": (1, 2), "mean_top_k": 1.5}
    table = markdown([first, limited, above, listed]).splitlines()
    assert [line.split("|")[2].strip() for line in table[2:]] == ["1", "top-p 0.9: 1.75", "threshold 0.05: 2.50", "1,2"]
    assert write([first, limited, above, listed], tmp_path, "other")[2].name == "other.png"
