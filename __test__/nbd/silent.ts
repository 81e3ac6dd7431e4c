/** An NBD server that says what a test lets it say, and then nothing. */

import { createServer, type Server, type Socket } from 'node:net'

const u16 = (value: number): Buffer => {
  const bytes = Buffer.alloc(2)
  bytes.writeUInt16BE(value)
  return bytes
}
const u32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(value)
  return bytes
}
const u64 = (value: bigint): Buffer => {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64BE(value)
  return bytes
}

const answer = (option: number, kind: number, data: Buffer): Buffer =>
  Buffer.concat([u64(0x3e889045565a9n), u32(option), u32(kind), u32(data.length), data])

const UNSUPPORTED = 0x80000001
const HEAD = 28

export interface SilentServer extends AsyncDisposable {
  /** Connections so far. */
  readonly connections: number
  /** Requests so far, of all connections. */
  readonly requests: number
}

export interface Silence {
  /** Where it listens. */
  readonly path: string
  /** Not even a greeting. */
  readonly mute?: boolean
  /** Size of its export. */
  readonly size?: number
  /** Requests of a connection that are answered, reads with zeroes. */
  readonly answers?: number
}

/** Starts one; it takes a disk to be there, and no more of a request than its head. */
export async function silentServer(silence: Silence): Promise<SilentServer> {
  const sockets = new Set<Socket>()
  let connections = 0
  let requests = 0
  const server: Server = createServer(socket => {
    connections += 1
    sockets.add(socket.on('error', () => {}))
    const heard = () => {
      requests += 1
    }
    if (!silence.mute) converse(socket, silence, heard)
  })
  await new Promise<void>(resolve => server.listen(silence.path, resolve))
  return {
    get connections() {
      return connections
    },
    get requests() {
      return requests
    },
    async [Symbol.asyncDispose]() {
      for (const socket of sockets) socket.destroy()
      await new Promise(resolve => server.close(resolve))
    },
  }
}

function converse(socket: Socket, { size = 1 << 20, answers = 0 }: Silence, count: () => void): void {
  let heard = Buffer.alloc(0)
  let greeted = false
  let begun = false
  let left = answers
  const options = (): boolean => {
    if (heard.length < 16 || heard.length < 16 + heard.readUInt32BE(12)) return false
    const option = heard.readUInt32BE(8)
    heard = heard.subarray(16 + heard.readUInt32BE(12))
    begun = option === 7
    const info = Buffer.concat([u16(0), u64(BigInt(size)), u16(0x65)])
    const go = Buffer.concat([answer(option, 3, info), answer(option, 1, Buffer.alloc(0))])
    socket.write(begun ? go : answer(option, UNSUPPORTED, Buffer.alloc(0)))
    return true
  }
  const requests = (): boolean => {
    if (heard.length < HEAD) return false
    const reads = heard.readUInt16BE(6) === 0
    const [cookie, length] = [heard.readBigUInt64BE(8), heard.readUInt32BE(24)]
    heard = heard.subarray(HEAD)
    left -= 1
    count()
    if (left >= 0) socket.write(Buffer.concat([u32(0x67446698), u32(0), u64(cookie), Buffer.alloc(reads ? length : 0)]))
    return true
  }
  socket.write(Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), u16(3)]))
  socket.on('data', bytes => {
    heard = Buffer.concat([heard, bytes])
    if (!greeted && heard.length >= 4) {
      greeted = true
      heard = heard.subarray(4)
    }
    while (greeted && (begun ? requests() : options()));
  })
}
