"""What a device may say of shadows and commands, and what it may not: one table for every way in.

name: (payload, HTTP status and `code`, reason, field)
"""

from __future__ import annotations

Fault = tuple[bytes, int, str, str]

SHADOW_BYTES_MAX, SHADOW_DEPTH_MAX = 8192, 8

GOOD_UPDATES = {
    "reported": b'{"state":{"reported":{"a":1}}}',
    "both, a version and a token": (
        b'{"state":{"desired":{"a":1},"reported":{"b":[{"c":null}]}},"version":0,"clientToken":"x"}'
    ),
    "a section is emptied": b'{"state":{"reported":null}}',
    "an attribute is deleted": b'{"state":{"reported":{"a":null}}}',
    "space, and numbers as they came": b' { "state" : { "reported" : { "a" : 1.0e1 } } } ',
    "as large as it may be": b'{"state":{"reported":{"a":"%b"}}}' % (b"x" * (SHADOW_BYTES_MAX - 8)),
    "larger than it may be, of which all is deleted": (
        b'{"state":{"reported":{' + b",".join(b'"attribute-%04d":null' % n for n in range(800)) + b"}}}"
    ),
    "as deep as it may be": (
        b'{"state":{"reported":' + b'{"a":' * SHADOW_DEPTH_MAX + b"1" + b"}" * SHADOW_DEPTH_MAX + b"}}"
    ),
    "the largest integer": b'{"state":{"reported":{"a":9223372036854775807,"b":-9223372036854775808}}}',
    "a colon in a text": b'{"state":{"reported":{"a":"\\":1,\\"a\\":2"}}}',
}

BAD_UPDATES: dict[str, Fault] = {
    "empty": (b"", 400, "invalid_json", ""),
    "cut off": (b'{"state":{"reported":{"a":1}', 400, "invalid_json", ""),
    "NaN": (b'{"state":{"reported":{"a":NaN}}}', 400, "invalid_json", ""),
    "half of a surrogate pair": (b'{"state":{"reported":{"a":"\\ud800"}}}', 400, "invalid_json", ""),
    "not UTF-8": (b'{"state":{"reported":{"a":"\xff"}}}', 400, "invalid_json", ""),
    "not an object": (b'[{"state":{"reported":{"a":1}}}]', 422, "invalid_payload", ""),
    "a text": (b'"state"', 422, "invalid_payload", ""),
    "no state": (b'{"version":1}', 422, "invalid_payload", "state"),
    "a state that says nothing": (b'{"state":{}}', 422, "invalid_payload", "state"),
    "a state that is no object": (b'{"state":7}', 422, "invalid_payload", "state"),
    "a section that is no object": (b'{"state":{"reported":[1]}}', 422, "invalid_payload", "state.reported"),
    "an unknown section": (b'{"state":{"reported":{"a":1},"delta":{}}}', 422, "invalid_payload", "state.delta"),
    "an unknown field": (b'{"state":{"reported":{"a":1}},"verison":1}', 422, "invalid_payload", "verison"),
    "a version that is a text": (b'{"state":{"reported":{"a":1}},"version":"1"}', 422, "invalid_payload", "version"),
    "a version that is a fraction": (
        b'{"state":{"reported":{"a":1}},"version":1.5}', 422, "invalid_payload", "version",
    ),
    "a version that is true": (b'{"state":{"reported":{"a":1}},"version":true}', 422, "invalid_payload", "version"),
    "a version below 0": (b'{"state":{"reported":{"a":1}},"version":-1}', 422, "invalid_payload", "version"),
    "a token too long": (
        b'{"state":{"reported":{"a":1}},"clientToken":"%b"}' % (b"x" * 65), 422, "invalid_payload", "clientToken",
    ),
    "U+0000": (b'{"state":{"reported":{"a":{"b":"\\u0000"}}}}', 422, "invalid_payload", "state.reported.a.b"),
    "U+0000 in a name": (b'{"state":{"reported":{"\\u0000":1}}}', 422, "invalid_payload", "state.reported"),
    "64 bits exceeded": (
        b'{"state":{"reported":{"a":[0,9223372036854775808]}}}', 422, "invalid_payload", "state.reported.a[1]",
    ),
    "a key twice": (b'{"state":{"reported":{"a":1,"a":2}}}', 422, "invalid_payload", ""),
    "a key twice, deep within": (b'{"state":{"reported":{"a":[{"b":1,"b":1}]}}}', 422, "invalid_payload", ""),
    "a state twice": (b'{"state":{"reported":{"a":1}},"state":{"reported":{"a":1}}}', 422, "invalid_payload", ""),
    "too large": (
        b'{"state":{"reported":{"a":"%b"}}}' % (b"x" * (SHADOW_BYTES_MAX - 7)), 413, "too_large", "state.reported",
    ),
    "too deep": (
        b'{"state":{"desired":' + b'{"a":' * (SHADOW_DEPTH_MAX + 1) + b"1" + b"}" * (SHADOW_DEPTH_MAX + 1) + b"}}",
        413, "too_large", "state.desired",
    ),
    "arrays too deep": (
        b'{"state":{"reported":{"a":' + b"[" * SHADOW_DEPTH_MAX + b"]" * SHADOW_DEPTH_MAX + b"}}}",
        413, "too_large", "state.reported",
    ),
    "as deep as a decoder can go": (
        b'{"state":{"reported":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}}", 413, "too_large", "state.reported",
    ),
    "deeper than a decoder can go": (
        b'{"state":{"reported":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}}", 400, "invalid_json", "",
    ),
}  # fmt: skip

GOOD_ANSWERS = {
    "acknowledged": b'{"commandId":"c-1","state":"acknowledged"}',
    "succeeded, with a result": b'{"commandId":"c-1","state":"succeeded","result":{"a":[1,{"b":null}]}}',
    "failed, with a reason": b'{"commandId":"c-1","state":"failed","error":"no power"}',
    "rejected": b' {"state":"rejected", "commandId":"c-1"} ',
}

BAD_ANSWERS: dict[str, Fault] = {
    "empty": (b"", 400, "invalid_json", ""),
    "not an object": (b"7", 422, "invalid_payload", ""),
    "no command": (b'{"state":"succeeded"}', 422, "invalid_payload", "commandId"),
    "no state": (b'{"commandId":"c-1"}', 422, "invalid_payload", "state"),
    "an unknown state": (b'{"commandId":"c-1","state":"done"}', 422, "invalid_payload", "state"),
    "a state that is not a device's": (b'{"commandId":"c-1","state":"sent"}', 422, "invalid_payload", "state"),
    "an id that is none": (b'{"commandId":"c 1","state":"failed"}', 422, "invalid_payload", "commandId"),
    "an unknown field": (b'{"commandId":"c-1","state":"failed","why":1}', 422, "invalid_payload", "why"),
    "an error too long": (
        b'{"commandId":"c-1","state":"failed","error":"%b"}' % (b"x" * 1025), 422, "invalid_payload", "error",
    ),
    "U+0000": (b'{"commandId":"c-1","state":"failed","result":{"a":"\\u0000"}}', 422, "invalid_payload", "result.a"),
    "NaN": (b'{"commandId":"c-1","state":"failed","result":NaN}', 400, "invalid_json", ""),
    "half of a surrogate pair": (b'{"commandId":"c-1","state":"failed","result":"\\ud800"}', 400, "invalid_json", ""),
    "a key twice": (b'{"commandId":"c-1","state":"failed","state":"failed"}', 422, "invalid_payload", ""),
    "a key twice in the result": (
        b'{"commandId":"c-1","state":"failed","result":{"a":1,"a":1}}', 422, "invalid_payload", "",
    ),
    "a result too deep": (
        b'{"commandId":"c-1","state":"failed","result":' + b"[" * 33 + b"]" * 33 + b"}", 413, "too_large", "result",
    ),
    "a result as deep as a decoder can go": (
        b'{"commandId":"c-1","state":"failed","result":' + b"[" * 900 + b"]" * 900 + b"}", 413, "too_large", "result",
    ),
}  # fmt: skip
