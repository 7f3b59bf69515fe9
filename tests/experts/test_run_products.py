import pytest

from fairseq_hyperrouter.experts.run_products import has_full_width

CPUINFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\n"


@pytest.mark.parametrize(
    "vendor, family, full",
    [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("GenuineIntel", 6, False), ("GenuineIntel", 26, False)],
)
def test_full_width_units_that_mkl_leaves_idle(vendor, family, full):
    assert has_full_width(CPUINFO.format(vendor, family)) is full


def test_other_machines_do_not_say():
    assert not has_full_width("processor\t: 0\nBogoMIPS\t: 50.00\n")
