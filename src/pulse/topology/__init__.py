"""The streams and consumers of Pulse: declared as JSON, compared with a server's by a pure planner.

streams/NAME.json               a StreamConfig of the JetStream API, as `nats stream add NAME --config` takes it
consumers/STREAM.NAME.json      a ConsumerConfig, as `nats consumer add STREAM NAME --config` takes it
declared.py                     reads and checks those files
subjects.py                     when two subjects can match the same message
cost.py                         what a change does to messages and consumers that are there
plan.py                         declared and actual → changes
"""
