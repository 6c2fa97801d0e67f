"""Replaces vLLM, which starts slowly: `health_server.py PORT` reports that it is healthy, and has a child process."""

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    engine = subprocess.Popen(["sleep", "600"])
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
