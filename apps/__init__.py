"""The Gradio apps. Each folder's run.py is one App value; all that they share lives in apps.common."""
