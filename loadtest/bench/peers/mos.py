"""The reference pipeline behind mosec (https://mosecorg.github.io/mosec).

mosec's documentation recommends to try the number of workers, the batch size and the delay. They were tried on two
cores, in turns, while other work ran on the machine: the medians, in requests/s, compare within a row only. The columns
are workers x batch size, delay; `*` marks what was chosen, by throughput without a loss for few clients.

    text, 1 client        2 x 32, 1 ms  284*   2 x 128, 1 ms  307     2 x 32, 5 ms  121     3 x 32, 1 ms  250
    text, 64 clients      2 x 32, 1 ms  11,021*  2 x 128, 1 ms  6,561   2 x 32, 5 ms  9,602   3 x 32, 1 ms  10,349
    text, 256 clients     2 x 32, 1 ms  11,654*  2 x 128, 1 ms  11,963  1 x 32, 1 ms  6,279   3 x 32, 1 ms  15,094
    mnist, 256 clients    2 x 64, 1 ms  3,463*   2 x 32, 1 ms  2,521    2 x 128, 1 ms  3,305  1 x 64, 1 ms  2,597
    audio, 64 clients     2 x 32, 1 ms  1,139*   2 x 8, 1 ms  968       2 x 4, 1 ms  955      2 x 16, 5 ms  960
    photo, 16 clients     2 x 8, 1 ms  24.3*     2 x 2, 1 ms  19.4      2 x 8, 20 ms  18.3    1 x 8, 1 ms  15.3
    photo-12mp, 16        2 x 8, 1 ms  6.1*      2 x 2, 1 ms  6.6       2 x 8, 20 ms  5.5
    cells, 16 clients     2 x 2, 1 ms  21.7*     2 x 8, 1 ms  19.0      2 x 2, 10 ms  21.7
    membrane, 16 clients  2 x 2, 1 ms  11.2*     2 x 8, 1 ms  8.1       2 x 2, 10 ms  12.7
    molecule, 16 clients  2 x 8, 1 ms  3,114*    2 x 16, 1 ms  2,555    2 x 32, 1 ms  1,941

Three workers for text were faster only with 256 clients, which may be due to the other work: the system gives more
processes more of the CPU.
"""

import json
import os
import sys
from pathlib import Path

from mosec import Server, Worker

from loadtest.bench.peers import task, workers
from loadtest.bench.pipeline import Pipeline

WAIT = 1  # ms, the shortest
BATCH = {"audio": 32, "molecule": 8}  # maximum; of other cases, that of the model folder
SETTINGS = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # of mosec's Rust server
    "MOSEC_ADDRESS": "127.0.0.1",
    "MOSEC_TIMEOUT": "60000",  # ms; with the default of 3 s, some of 1,024 clients get a 408
    "MOSEC_CAPACITY": "4096",  # requests; more than clients
    "MOSEC_LOG_LEVEL": "warning",
}
served = task()  # mosec's workers are processes that import this module, with the same command line


class Model(Worker):
    def __init__(self):
        super().__init__()
        self.pipeline = Pipeline(served.case, threads=1)

    def deserialize(self, data: bytes):
        return self.pipeline.decode(data)

    def forward(self, data: list) -> list[dict]:
        return self.pipeline.predict(data)

    def serialize(self, data: dict) -> bytes:
        return json.dumps(data).encode()


if __name__ == "__main__":
    os.environ |= SETTINGS | {"MOSEC_PORT": str(served.port)}
    server = Server()
    size = BATCH.get(served.case, served.batch_size)
    server.append_worker(Model, num=workers(), max_batch_size=size, max_wait_time=WAIT)
    server.run()
