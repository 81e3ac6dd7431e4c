/** A proxy in front of a real server, which passes everything on but for the faults that it is told. */

import {
  type ClientRequest,
  createServer,
  type IncomingHttpHeaders,
  type IncomingMessage,
  request,
  type Server,
  type ServerResponse,
} from 'node:http'
import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

/** Where the real server listens. */
export type Upstream = { readonly socketPath: string } | { readonly host: string; readonly port: number }

/** What the real server said, before it is said on. */
export interface Head {
  status: number
  headers: IncomingHttpHeaders
}

/** A request and what becomes of it. */
export interface Exchange {
  readonly request: IncomingMessage
  readonly response: ServerResponse
  /** Asks the real server. `cut`: bytes of the body after which the connection is cut. */
  forward(change?: (head: Head) => void, cut?: number): void
}

/** What a proxy does instead of passing a request on. */
export type Fault = (exchange: Exchange) => void

export class FaultProxy {
  /** The range, or else method and path, of each request since {@link FaultProxy.reset}. */
  readonly seen: string[] = []
  readonly headers: IncomingHttpHeaders[] = []
  /** What becomes of the next requests, one for each. */
  faults: Fault[] = []
  /** What becomes of all that follow. */
  always: Fault = ({ forward }) => forward()
  readonly #server: Server
  readonly #upstream: Upstream

  private constructor(upstream: Upstream) {
    this.#upstream = upstream
    this.#server = createServer((request, response) => {
      this.seen.push(request.headers.range ?? `${request.method} ${request.url}`)
      this.headers.push(request.headers)
      const fault = this.faults.shift() ?? this.always
      response.on('error', () => {})
      fault({ request, response, forward: (change, cut) => this.#forward(request, response, change, cut) })
    })
  }

  static async start(upstream: Upstream): Promise<FaultProxy> {
    const proxy = new FaultProxy(upstream)
    await new Promise<void>(resolve => proxy.#server.listen(0, '127.0.0.1', resolve))
    return proxy
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port
  }

  get origin(): string {
    return `http://127.0.0.1:${this.port}`
  }

  /** Forgets what was seen, and has faults from now on. */
  reset(...faults: Fault[]): void {
    this.seen.length = 0
    this.headers.length = 0
    this.faults = faults
    this.always = ({ forward }) => forward()
  }

  async stop(): Promise<void> {
    this.#server.closeAllConnections()
    await new Promise(resolve => this.#server.close(resolve))
  }

  #forward(from: IncomingMessage, to: ServerResponse, change: ((head: Head) => void) | undefined, cut = -1): void {
    const { method, url: path, headers } = from
    const asked: ClientRequest = request({ ...this.#upstream, method, path, headers, agent: false }, answer => {
      const head = { status: answer.statusCode ?? 0, headers: { ...answer.headers } }
      change?.(head)
      to.writeHead(head.status, head.headers as Record<string, string>)
      let left = cut
      answer.on('data', (chunk: Buffer) => {
        if (cut < 0) to.write(chunk)
        else if (left > 0) to.write(chunk.subarray(0, left), () => left <= 0 && to.destroy())
        left -= chunk.length
        if (cut === 0) to.destroy()
      })
      answer.on('end', () => to.end())
    })
    asked.on('error', () => to.destroy())
    to.on('close', () => asked.destroy())
    from.pipe(asked)
  }
}

/** A status, with headers. */
export const status =
  (code: number, headers: Record<string, string> = {}): Fault =>
  ({ response }) => {
    response.writeHead(code, headers).end('an error, in the words of a server')
  }

/** The connection is lost before there is an answer. */
export const reset: Fault = ({ request }) => {
  request.socket.destroy()
}

/** Nothing is said. */
export const mute: Fault = () => {}

/** The body is cut after so many bytes. */
export const cut =
  (bytes: number): Fault =>
  ({ forward }) =>
    forward(undefined, bytes)

/** The answer, with other headers or another status. */
export const altered =
  (headers: Record<string, string | undefined>, code?: number): Fault =>
  ({ forward }) =>
    forward(head => {
      for (const [name, value] of Object.entries(headers)) {
        if (value === undefined) delete head.headers[name]
        else head.headers[name] = value
      }
      head.status = code ?? head.status
    })

/** Bytes until the other side has enough; `told` gets how many went out. */
export const endless =
  (head: Record<string, string>, told: (bytes: number) => void): Fault =>
  async ({ response }) => {
    response.writeHead(206, head)
    const closed = new Promise(resolve => response.once('close', resolve))
    let sent = 0
    while (!response.destroyed && sent < 2 ** 28) {
      sent += 65_536
      const more = response.write(Buffer.alloc(65_536))
      await (more ? sleep(0) : Promise.race([closed, new Promise(resolve => response.once('drain', resolve))]))
    }
    told(sent)
  }
