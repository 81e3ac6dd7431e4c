/** An export that is described by options of QEMU's `nbd` driver: `server.type=unix,server.path=PATH,export=NAME`. */

import { CommandFailure, unsupported } from './failure.js'
import { uriOf } from './nbd-names.js'
import { parseValue } from './options.js'

/** QEMU's name of the driver. */
export const NBD_DRIVER = 'nbd'

/** What says where the server is: each also without `server.`, as before there were servers of other kinds. */
const UNIX = ['server.path', 'path'] as const
const HOST = ['server.host', 'host'] as const
const PORT = ['server.port', 'port'] as const

/** The URI of the export that options describe; their names begin with `prefix`. */
export function describedExport(values: ReadonlyMap<string, string>, prefix: string): string {
  const get = (names: readonly string[]): string | undefined => {
    const given = names.map(name => values.get(`${prefix}${name}`)).filter(value => value !== undefined)
    if (given.length > 1) throw new CommandFailure(`'${names.join("' and '")}' may not be used at the same time`)
    return given[0]
  }
  const [path, host, port] = [get(UNIX), get(HOST), get(PORT)]
  const type = values.get(`${prefix}server.type`)
  const name = values.get(`${prefix}export`) ?? ''
  const modern = ['server.path', 'server.host', 'server.port'].some(each => values.has(`${prefix}${each}`))
  if (modern && type === undefined) throw new CommandFailure("Parameter 'server.type' is missing")
  if (path !== undefined && host !== undefined) {
    throw new CommandFailure('path and host may not be used at the same time')
  }
  switch (type ?? (path === undefined ? 'inet' : 'unix')) {
    case 'unix':
      if (path === undefined) throw new CommandFailure("Parameter 'server.path' is missing")
      return uriOf({ path }, name)
    case 'inet':
      if (host === undefined) {
        throw new CommandFailure(
          type === undefined ? 'NBD server address missing' : "Parameter 'server.host' is missing",
        )
      }
      if (port === undefined && type !== undefined) throw new CommandFailure("Parameter 'server.port' is missing")
      return uriOf({ host, ...(port !== undefined && { port }) }, name)
    default:
      throw unsupported(`server.type=${type}`, 'NBD servers are on unix sockets and TCP ports: unix or inet')
  }
}

/** How the server of an export is reached. */
export interface ExportConnection {
  /** The id of what TLS begins with. */
  readonly tlsCreds?: string
  /** What the server's certificate must be for. */
  readonly tlsHostname?: string
  /** Seconds for which a lost connection is made again. */
  readonly reconnectDelay?: number
}

/** The longest time that requests wait: what the library takes in milliseconds. */
const MAX_DELAY = 2_147_483n

/** One option of the driver; false where it has none of this name. */
export function takeOfExport(
  name: string,
  value: string,
  connection: { -readonly [K in keyof ExportConnection]: ExportConnection[K] },
): boolean {
  switch (name) {
    case 'driver':
      return value === NBD_DRIVER
    case 'server.type':
    case 'server.path':
    case 'server.host':
    case 'server.port':
    case 'path':
    case 'host':
    case 'port':
    case 'export':
      return true
    case 'open-timeout':
      parseValue({ name, type: 'number' }, value)
      return true
    case 'reconnect-delay': {
      const seconds = parseValue({ name, type: 'number' }, value)
      if (typeof seconds !== 'bigint' || seconds > MAX_DELAY) {
        throw new CommandFailure(`Parameter '${name}' expects a number of 0 to ${MAX_DELAY} seconds`)
      }
      connection.reconnectDelay = Number(seconds)
      return true
    }
    case 'tls-creds':
      connection.tlsCreds = value
      return true
    case 'tls-hostname':
      connection.tlsHostname = value
      return true
    default:
      return false
  }
}
