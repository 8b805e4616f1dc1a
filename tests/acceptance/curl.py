"""`curl` for the walk through the API: notes each request, then has the real one send it.

Where no curl is installed, the options that the walk uses are done here.
"""

import json
import os
import shutil
import sys
from http.cookiejar import MozillaCookieJar
from pathlib import Path

import httpx

WITH_VALUE = {"-X", "-H", "-d", "-b", "-c", "-o", "-w"}
"""The options of the walk that take a value; the others are flags."""


def main(arguments: list[str]) -> int:
    options, url = parsed(arguments)
    method = options.get("-X", ["POST" if "-d" in options else "GET"])[0]
    with Path(os.environ["CURL_NOTES"]).open("a", encoding="utf-8") as notes:
        notes.write(json.dumps([method, url]) + "\n")
    real = shutil.which("curl", path=os.environ["CURL_PATH"])
    if real:
        os.execv(real, [real, *arguments])  # noqa: S606 - itself
    return send(method, url, options, fails="-fsS" in arguments)


def parsed(arguments: list[str]) -> tuple[dict[str, list[str]], str]:
    options: dict[str, list[str]] = {}
    urls: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in WITH_VALUE:
            options.setdefault(argument, []).append(next(rest))
        elif not argument.startswith("-"):
            urls.append(argument)
    (url,) = urls
    return options, url


def send(method: str, url: str, options: dict[str, list[str]], *, fails: bool) -> int:
    headers = dict(header.split(": ", 1) for header in options.get("-H", []))
    if "-d" in options:
        headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
    jar = MozillaCookieJar()
    for name in options.get("-b", []):
        jar.load(name, ignore_discard=True)
    with httpx.Client(cookies=jar, timeout=60) as client:
        body = "&".join(options["-d"]) if "-d" in options else None
        answer = client.request(method, url, headers=headers, content=body)
        saved = MozillaCookieJar()
        for cookie in client.cookies.jar:
            saved.set_cookie(cookie)
    for name in options.get("-c", []):
        saved.save(name, ignore_discard=True)
    if fails and answer.is_error:
        sys.stderr.write(f"curl: (22) The requested URL returned error: {answer.status_code}\n")
        return 22
    for name in options.get("-o", []):
        Path(name).write_bytes(answer.content)
    if "-o" not in options:
        sys.stdout.write(answer.text)
    for form in options.get("-w", []):
        sys.stdout.write(form.replace("%{http_code}", str(answer.status_code)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
