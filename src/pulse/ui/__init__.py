"""The web console: server-rendered pages, one style sheet, little script.

Every page works without scripts; htmx refreshes lists in place, `live.js` shows what is streamed, uPlot draws charts.
"""
