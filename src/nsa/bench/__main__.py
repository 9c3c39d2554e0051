"""``python -m nsa.bench``."""

from nsa.cli.bench import bench_app as app

if __name__ == "__main__":
    app(prog_name="python -m nsa.bench")
