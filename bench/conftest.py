"""Options of `pytest bench/`: which ops and sizes."""


def pytest_addoption(parser):
    parser.addoption("--ops", default="linear", help="comma-separated ops, or all")
    parser.addoption("--sizes", default="vision,long,cifar", help="comma-separated sizes")
    parser.addoption("--budget", default=3.0, type=float, help="seconds per contestant")
