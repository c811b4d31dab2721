"""The page's rooms: what each tab shows, as plain JSON values, and what happens when a control is used.

A page holds no arithmetic: numbers come from lora_core, runs from app.runs, pictures from app.figures. The browser's
side of each tab is the module of the same name in app/static. `play` and `questions` will be two more files here.
"""
