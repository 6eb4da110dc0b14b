"""Requests to an ASGI application in this process, without a socket."""

import asyncio
import json


class Client:
    """A browser or program at ``app``; every request has an event loop of its own."""

    def __init__(self, app, host="127.0.0.1:8765", **headers):
        self.app, self.headers = app, {"host": host, **headers}

    def get(self, path, **headers):
        return self.request("GET", path, None, headers)

    def post(self, path, body, **headers):
        return self.request("POST", path, body, {"content-type": "application/json", **headers})

    def request(self, method, path, body, headers):
        """Return ``(status, headers, body)``."""
        return asyncio.run(self.exchange(method, path, body, headers))

    def events(self, path, question=None, **headers):
        """Return the events of a scan."""
        status, _, body = (
            self.get(path, **headers) if question is None else self.post(path, question, **headers)
        )
        assert status == 200, body
        return [json.loads(line) for line in body.splitlines()]

    async def exchange(self, method, path, body=None, headers=None, leave_after=None):
        """Make a request in a running loop; leave after so many parts of the answer's body."""
        path, _, query = path.partition("?")
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        given = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "query_string": query.encode(),
            "root_path": "",
            "scheme": "http", "server": ("127.0.0.1", 8765), "client": ("127.0.0.1", 1),
            "headers": [
                (name.lower().encode(), value.encode())
                for name, value in {**self.headers, **given}.items()
                if value is not None
            ],
        }  # fmt: skip
        requests = [{"type": "http.request", "body": data, "more_body": False}]
        left, answer, parts = asyncio.Event(), {}, []

        async def receive():
            if requests:
                return requests.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                answer.update(message)
                return
            if message.get("body"):
                parts.append(message["body"])
            if leave_after is not None and len(parts) >= leave_after:
                left.set()
                await asyncio.sleep(0)

        await self.app(scope, receive, send)
        found = {name.decode(): value.decode() for name, value in answer["headers"]}
        return answer["status"], found, b"".join(parts)
