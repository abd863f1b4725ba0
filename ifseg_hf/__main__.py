"""`python -m ifseg_hf`, which `accelerate launch -m ifseg_hf` starts in several processes: the program `ifseg`."""

from ifseg_hf.cli.main import app

if __name__ == "__main__":
    app(prog_name="ifseg")
