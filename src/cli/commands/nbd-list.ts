/** `qcow2 nbd --list`: the exports of a server, as qemu-nbd prints them. */

import { listNbd, type NbdExport } from '../../index.js'
import { exactText } from '../../text.js'
import { describeError } from '../errors.js'
import { CommandFailure } from '../failure.js'
import { uriOf } from '../nbd-names.js'
import { saying } from '../secrets.js'
import type { Session } from '../session.js'
import { namedTls } from '../tls-objects.js'

/** What can be said with `--list`: where the server is. */
export interface ListArguments {
  readonly list?: boolean
  readonly socket?: string
  readonly port?: number
  readonly bind?: string
  readonly tlsCreds?: string
  readonly tlsHostname?: string
}

/** Names of the transmission flags, from the second bit on: the first one says that the others mean something. */
const FLAGS = [
  'readonly',
  'flush',
  'fua',
  'rotational',
  'trim',
  'zeroes',
  'df',
  'multi',
  'resize',
  'cache',
  'fast-zero',
  'block-status-payload',
]

/** Options that are about an export that is served. */
const OF_EXPORTS: ReadonlySet<string> = new Set([
  'exportName',
  'description',
  'offset',
  'format',
  'loadSnapshot',
  'bitmap',
  'allocationDepth',
  'aio',
  'discard',
  'cache',
  'nocache',
])

/** What TLS begins with, in qemu-nbd's words where that is nothing. */
export function tlsOf<T>(id: string | undefined, read: (id: string) => T): T | undefined {
  return id === undefined ? undefined : saying('Failed to get TLS creds', () => read(id))
}

/** Lists the exports of a server. */
export async function listExports(
  files: readonly string[],
  options: ListArguments,
  defaultPort: number,
  session: Session,
): Promise<number> {
  if (files.length > 0) throw new CommandFailure('List mode is incompatible with a file name')
  if (Object.keys(options).some(name => OF_EXPORTS.has(name))) {
    throw new CommandFailure('List mode is incompatible with per-device settings')
  }
  const { socket, bind: host = '0.0.0.0', port = defaultPort } = options
  const { tlsCreds, tlsHostname } = options
  const credentials = tlsOf(tlsCreds, id => session.objects.clientTls(id))
  const tls = credentials && namedTls(credentials, tlsHostname ?? host)
  const server = socket === undefined ? { host, port: String(port) } : { path: socket }
  const exports = await listNbd(uriOf(server, ''), { signal: session.signal, tls }).catch(error => {
    if (session.signal.aborted) throw error
    throw new CommandFailure(describeError(error), { cause: error })
  })
  session.stdout.write(`exports available: ${exports.length}\n${exports.map(describeExport).join('')}`)
  return 0
}

function describeExport(each: NbdExport): string {
  const { size, flags, blockSizes, contexts, extendedHeaders } = each
  const description = exactText(each.description, each.descriptionBytes)
  const named = FLAGS.filter((_, index) => flags !== undefined && (flags >> (index + 1)) & 1)
  return [
    ` export: '${exactText(each.name, each.nameBytes)}'`,
    ...(description === '' ? [] : [`  description: ${description}`]),
    ...(size === undefined || flags === undefined
      ? []
      : [`  size:  ${size}`, `  flags: 0x${flags.toString(16)} ( ${named.map(name => `${name} `).join('')})`]),
    ...(blockSizes === undefined
      ? []
      : [
          `  min block: ${blockSizes.minimum}`,
          `  opt block: ${blockSizes.preferred}`,
          `  max block: ${blockSizes.maximum}`,
        ]),
    `  transaction size: ${extendedHeaders ? 64 : 32}-bit`,
    ...(contexts.length === 0 ? [] : [`  available meta contexts: ${contexts.length}`]),
    ...contexts.map(context => `   ${context}`),
  ]
    .map(line => `${line}\n`)
    .join('')
}
