"""The page: `python -m shapediff.app` serves it. The only package with gradio, in `page.py` and `server.py` alone."""
