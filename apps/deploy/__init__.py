"""Puts an app on Hugging Face Spaces: `plan` checks what is asked, `folder` writes a Space, `upload` sends it.

`zero` runs jobs where the GPU is lent call by call (ZeroGPU); the page itself asks for it there.
"""
