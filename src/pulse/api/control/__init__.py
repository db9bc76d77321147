"""The control API, under `/api/v1`: one module for each resource, FastAPI behind a bounded entrance.

entrance.py    whose key it is, and the body within its bound; before FastAPI sees anything
errors.py      every error as application/problem+json
tenants.py  devices.py  device_import.py  telemetry.py  shadows.py  commands.py  fleet_commands.py  routes.py
dead_letters.py
streams.py  changes.py  keys.py
"""
