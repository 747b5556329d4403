"""The fork server imports torch and transformers while the tests are being collected."""

from harness import start_server

start_server()
