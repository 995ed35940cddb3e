"""A TCP proxy that hands on every byte, in order, a fixed time after it came. Prints its port.

python benchmarks/delay_proxy.py HOST PORT SECONDS_EACH_WAY
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def hand_on() -> None:
        while True:
            due, data = await held.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                break
            writer.write(data)
            await writer.drain()
        writer.close()

    handing = asyncio.create_task(hand_on())
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            held.put_nowait((loop.time() + delay_s, data))
    held.put_nowait((loop.time() + delay_s, b""))
    with contextlib.suppress(OSError):
        await handing


async def serve(host: str, port: int, delay_s: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(reader, server_writer, delay_s), pump(server_reader, writer, delay_s))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("delay_s", type=float)
    args = parser.parse_args()
    asyncio.run(serve(args.host, args.port, args.delay_s))


if __name__ == "__main__":
    main()
