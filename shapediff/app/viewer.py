"""The shapes in the browser: a page of its own in a frame that can reach neither this page nor any server."""

from __future__ import annotations

import html

from shapediff.app.results import meshes
from shapediff.geometry.html import html_page
from shapediff.shapes import Shapes

HEIGHT = 600
EMPTY = "<div class='empty'>Your shapes will stand here.</div>"
CSS = f"""
.gradio-container {{ max-width: 1480px !important; }}
.viewer iframe, .viewer .empty {{ width: 100%; height: {HEIGHT}px; border: 0; border-radius: 12px; }}
.viewer .empty {{ display: flex; align-items: center; justify-content: center; background: #f3f2f0; color: #78716c; }}
.result {{ position: sticky; top: 12px; align-self: flex-start; }}
#files {{ border: 0; }}
#source_file, #target_file {{ border: 1px dashed var(--border-color-primary); }}
"""


def viewer(shapes: Shapes) -> str:
    """HTML that shows shapes to turn, and says which came out empty."""
    found, names = meshes(shapes)
    missing = [name for name in shapes.names if name not in names]
    frame = ""
    if found:
        # Sandboxed: names of classes come from checkpoints, and whatever a script in there did would stay in there.
        page = html.escape(html_page(found, names, title=_title(shapes)), quote=True)
        frame = f'<iframe title="shapes" sandbox="allow-scripts allow-downloads" srcdoc="{page}"></iframe>'
    if missing:
        frame += f"<p>Came out empty: {html.escape(', '.join(missing))}. Try another seed, or more guidance.</p>"
    return frame


def _title(shapes: Shapes) -> str:
    return ", ".join(dict.fromkeys(name or "shapes" for name in shapes.classes))
