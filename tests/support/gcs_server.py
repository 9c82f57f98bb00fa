"""A Google Cloud Storage in memory on this machine: `python -m tests.support.gcs_server PORT`."""

import contextlib
import sys
import time

from gcp_storage_emulator.handlers import objects


def main() -> None:
    download = objects.download

    def with_generation(request, response, storage, *args, **kwargs):
        """TensorStore wants to know which version it has read; the emulator does not say."""
        place = request.params["bucket_name"], request.params["object_id"]
        with contextlib.suppress(objects.NotFound):  # `download` answers 404
            response["x-goog-generation"] = storage.get_file_obj(*place)["generation"]
        return download(request, response, storage, *args, **kwargs)

    objects.download = with_generation  # before the server takes it into its table
    from gcp_storage_emulator.server import create_server

    server = create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
    server.start()
    print("ready", flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
