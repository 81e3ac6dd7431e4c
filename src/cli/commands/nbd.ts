import { mkdtempSync, rmSync, unlinkSync, writeFileSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { type Command, Option } from 'commander'
import { PLAIN_FORMAT } from '../../formats/table.js'
import {
  create,
  type Format,
  type Image,
  type NbdOptions,
  type NbdServerTls,
  Qcow2Error,
  serveNbd,
} from '../../index.js'
import { decodeText, toName } from '../../text.js'
import { handedOver } from '../arguments.js'
import { describeError, openFailure, strerror } from '../errors.js'
import { CommandFailure } from '../failure.js'
import { localPath } from '../filename.js'
import { refuse, SOURCES, takeDriverSyntax, toCacheMode } from '../grammar.js'
import { formatOf, snapshotOf, withImage } from '../images.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'
import { type ListArguments, listExports, tlsOf } from './nbd-list.js'

interface NbdArguments extends ListArguments {
  readonly format?: string
  readonly readOnly?: boolean
  readonly persistent?: boolean
  readonly shared?: number
  readonly exportName?: string
  readonly description?: string
  readonly bitmap?: readonly string[]
  readonly allocationDepth?: boolean
  readonly handshakeLimit?: number
  readonly pidFile?: string
  readonly fork?: boolean
  readonly verbose?: boolean
  readonly snapshot?: boolean
  readonly loadSnapshot?: string
  readonly nocache?: boolean
  readonly cache?: string
  readonly discard?: string
  readonly detectZeroes?: string
  readonly offset?: bigint
}

const DEFAULT_PORT = 10809
const MAX_CONNECTIONS = 1024
const MAX_NAME = 4096

/** The descriptor on which a server that was forked off says that it listens; and the variable that says that it was. */
const READY = 3
const FORKED = 'QCOW2_NBD_FORKED'

const number = (what: string, least: number, most: number) => (value: string) => {
  const read = /^\d+$/.test(value) ? Number(value) : Number.NaN
  if (read >= least && read <= most) return read
  throw new CommandFailure(`Invalid ${what} '${value}'`)
}

const oneOf =
  (values: readonly string[], refused: (value: string) => string) =>
  (value: string): string => {
    if (values.includes(value)) return value
    throw new CommandFailure(refused(value))
  }

const named = (what: string) => (value: string) => {
  if (Buffer.byteLength(value) <= MAX_NAME) return value
  throw new CommandFailure(`export ${what} '${value}' too long`)
}

function toOffset(text: string): bigint {
  const offset = /^(0x[0-9a-f]+|\d+)$/i.test(text) ? BigInt(text) : -1n
  if (offset >= 0n && offset < 2n ** 63n) return offset
  throw new CommandFailure(`Invalid offset '${text}'`)
}

const CACHE = ['none', 'off', 'writeback', 'writethrough', 'directsync', 'unsafe']

export function declareNbd(program: Command, run: Runner): void {
  const command = program
    .command('nbd')
    .summary('serve an image over NBD')
    .description(
      'Serve the disk of an image over NBD, the network block device protocol, on a unix socket or a TCP port. The server ends with its ' +
        'last client, or goes on with -t until it is interrupted. With -L, list what another server exports. Nothing is encrypted ' +
        'without --tls-creds.',
    )
    .usage('[options] FILE')
    .argument('[files...]', 'the image')
    .option('-k, --socket <path>', 'listen on a unix socket', absolute)
    .option('-p, --port <port>', `listen on a TCP port (default: ${DEFAULT_PORT})`, number('port', 0, 65535))
    .option('-b, --bind <address>', 'listen on this address only (default: 0.0.0.0)')
    .option(
      '-e, --shared <count>',
      'clients at once, 0 for many (default: 1)',
      number('shared device number', 0, 2 ** 31),
    )
    .option('-t, --persistent', 'go on when the last client has gone')
    .option('-x, --export-name <name>', 'name that clients ask for (default: none)', named('name'))
    .option('-D, --description <text>', 'what it is, for a person', named('description'))
    .option('-B, --bitmap <name>', 'tell of a persistent bitmap', (name, all: string[] = []) => [...all, name])
    .option('-A, --allocation-depth', 'tell how deep in the backing chain data is')
    .option('-r, --read-only', 'refuse writes')
    .option('-f, --format <fmt>', `format of the image: ${SOURCES} (default: what it looks like)`)
    .option('-s, --snapshot', 'keep what is written in a temporary file, and the image as it is')
    .option('-l, --load-snapshot <snapshot>', 'serve an internal snapshot, read-only')
    .option('-o, --offset <offset>', 'serve what lies behind this byte', toOffset)
    .option('-n, --nocache', 'bypass the page cache')
    .option(
      '--cache <mode>',
      `how the image is cached: ${CACHE.join(', ')}`,
      oneOf(CACHE, v => `Invalid cache mode \`${v}'`),
    )
    .option('--discard <mode>', 'what a discard does: ignore or unmap', toDiscard)
    .option('--detect-zeroes <mode>', 'what a write of zeroes becomes: off, on or unmap', toDetectZeroes)
    .option(
      '--handshake-limit <seconds>',
      'time for a client to begin (default: 10)',
      number('handshake limit', 0, 2 ** 21),
    )
    .option('--fork', 'come back when the server listens, and let it run')
    .option('--pid-file <path>', "write the server's process id into this file")
    .option('-L, --list', 'list the exports of a server')
    .option('-v, --verbose', 'keep standard error open')
    .addOption(
      new Option('--aio <mode>')
        .hideHelp()
        .argParser(oneOf(['native', 'io_uring', 'threads'], v => `Invalid aio mode '${v}'`)),
    )
  command.option('-V, --version', 'print the version')
  takeDriverSyntax(command)
  command.option('--tls-creds <id>', 'encrypt connections with this object: tls-creds-x509 or tls-creds-psk')
  command.option('--tls-hostname <name>', "with -L: what the server's certificate must be for")
  refuse(command, '--tls-authz <id>', 'certificates and keys say who may connect')
  refuse(command, '-c, --connect <device>', "the kernel's client is attached with nbd-client")
  refuse(command, '-d, --disconnect', "the kernel's client is detached with nbd-client")
  refuse(command, '-T, --trace <events>', 'there are no trace events')
  refuse(command, '--selinux-label <label>', 'sockets get the label of the process')
  command.action((files: string[], options: NbdArguments) => run(session => nbd(files, options, session)))
}

function absolute(path: string): string {
  if (path.startsWith('/')) return path
  throw new CommandFailure('socket path must be absolute')
}

const DISCARD: Readonly<Record<string, string>> = { ignore: 'ignore', off: 'ignore', unmap: 'unmap', on: 'unmap' }

function toDiscard(mode: string): string {
  const read = Object.hasOwn(DISCARD, mode) ? DISCARD[mode] : undefined
  if (read === undefined) throw new CommandFailure(`Invalid discard mode \`${mode}'`)
  return read
}

const toDetectZeroes = oneOf(
  ['off', 'on', 'unmap'],
  value => `Failed to parse detect_zeroes mode: invalid parameter value: ${value}`,
)

async function nbd(files: readonly string[], options: NbdArguments, session: Session): Promise<number> {
  if (options.tlsHostname !== undefined && options.tlsCreds === undefined) {
    throw new CommandFailure('--tls-hostname is not permitted without --tls-creds')
  }
  if (options.list) return listExports(files, options, DEFAULT_PORT, session)
  if (options.tlsHostname !== undefined) throw new CommandFailure('TLS hostname is only supported with export list')
  const tls = tlsOf(options.tlsCreds, id => session.objects.serverTls(id))
  const [filename] = files
  if (filename === undefined || files.length !== 1) {
    throw new CommandFailure('Invalid number of arguments', {
      hint: `Try \`${session.program} --help' for more information.`,
    })
  }
  if (options.nocache && options.cache !== undefined) {
    throw new CommandFailure('-n and --cache can only be specified once')
  }
  if (options.detectZeroes === 'unmap' && options.discard !== 'unmap') {
    throw new CommandFailure('setting detect-zeroes to unmap is not allowed without setting discard operation to unmap')
  }
  if (options.socket !== undefined && (options.port !== undefined || options.bind !== undefined)) {
    throw new CommandFailure('-k cannot be used together with -p or -b: the server listens in one place')
  }
  if (options.fork && session.env[FORKED] === undefined) return fork(options, session)
  const cannot = (error: unknown): never => {
    if (session.signal.aborted) throw error
    const failure = openFailure(filename, error)
    const opening = `Could not open '${filename}': `
    if (!failure.message.startsWith(opening)) throw failure
    const reason = failure.message.slice(opening.length)
    throw new CommandFailure(`Failed to blk_new_open '${filename}': ${reason}`, {
      cause: error,
      ...(failure.hint !== undefined && { hint: failure.hint }),
    })
  }
  const format = await formatOf(filename, options.format, session).catch(cannot)
  if (options.snapshot) return overlaid(filename, format, options, tls, session)
  const readOnly = options.readOnly || options.loadSnapshot !== undefined
  if (!readOnly) refuseGuess(filename, format, options, session)
  const snapshot = await snapshotOf(filename, format, options.loadSnapshot, undefined, session)
  const mode = options.nocache ? 'none' : options.cache
  const cache = mode === undefined ? undefined : toCacheMode(mode)
  const request = {
    filename,
    format,
    snapshot,
    flags: readOnly ? 'r' : 'r+',
    cache,
    ...(!readOnly && {
      discard: options.discard as 'ignore' | 'unmap' | undefined,
      detectZeroes: options.detectZeroes as 'off' | 'on' | 'unmap' | undefined,
    }),
  } as const
  // What fails while it is served has its own words.
  let served = false
  await withImage(request, session, image => {
    served = true
    return serve(image, options, tls, session)
  }).catch((error: unknown) => {
    if (served) throw error
    return cannot(error)
  })
  return 0
}

/** A guest can write any header into a raw disk: what is taken for raw must have been said to be, where it is written to. */
function refuseGuess(filename: string, format: Format, { format: said }: NbdArguments, { objects }: Session): void {
  if (format !== PLAIN_FORMAT || said !== undefined || objects.formatOf(filename) !== undefined) return
  throw new CommandFailure(`Image format was not specified for '${filename}' and probing guessed ${PLAIN_FORMAT}.`, {
    hint: `Specify '-f ${PLAIN_FORMAT}' to write to it, or '-r' to serve it for reading.`,
  })
}

/** Serves a temporary overlay of the image, which goes with the server. */
async function overlaid(
  filename: string,
  format: Format,
  options: NbdArguments,
  tls: NbdServerTls | undefined,
  session: Session,
): Promise<number> {
  if (options.loadSnapshot !== undefined) throw new CommandFailure('-s and -l cannot be used together')
  if (session.objects.secretsOf(filename) !== undefined) {
    throw new CommandFailure('-s cannot be used with images that are described by options')
  }
  const folder = mkdtempSync(join(tmpdir(), 'qcow2-nbd-'))
  try {
    const path = join(folder, 'overlay.qcow2')
    const backing = toName(resolve(localPath(filename)))
    const size = await withImage({ filename, format }, session, async image => image.virtualSizeBigInt)
    const overlay = await create(path, { size, backingFile: backing, backingFormat: format })
    await overlay.close()
    const request = { filename: path, format: 'qcow2', flags: 'r+', cache: 'unsafe' } as const
    await withImage(request, session, image => serve(image, options, tls, session))
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
  return 0
}

async function serve(
  image: Image,
  options: NbdArguments,
  tls: NbdServerTls | undefined,
  session: Session,
): Promise<void> {
  const { offset = 0n, shared = 1, handshakeLimit } = options
  if (offset > 0n && offset >= image.virtualSizeBigInt) {
    throw new CommandFailure(`Offset (${offset}) has to be smaller than the image size (${image.virtualSizeBigInt})`)
  }
  const where =
    options.socket === undefined
      ? { port: options.port ?? DEFAULT_PORT, host: options.bind ?? '0.0.0.0' }
      : { path: toName(options.socket) }
  const how: NbdOptions = {
    ...where,
    exportName: toName(options.exportName ?? ''),
    description: options.description ?? '',
    offset,
    readOnly: image.readOnly || options.readOnly === true,
    persistent: options.persistent ?? false,
    maxConnections: shared === 0 ? MAX_CONNECTIONS : Math.min(shared, MAX_CONNECTIONS),
    allocationDepth: options.allocationDepth ?? false,
    bitmaps: (options.bitmap ?? []).map(toName),
    // 0 is as long as it takes.
    handshakeTimeout: handshakeLimit === 0 ? 2 ** 31 - 1 : (handshakeLimit ?? 10) * 1000,
    tls,
    signal: session.signal,
  }
  const server = await serveNbd(image, how).catch(error => {
    throw session.signal.aborted ? error : servingFailure(error, options)
  })
  const { pidFile } = options
  try {
    if (pidFile !== undefined) writePid(pidFile)
    if (session.env[FORKED] !== undefined) writeSync(READY, '\n')
    await server.closed
  } finally {
    await server.close()
    if (pidFile !== undefined) removeQuietly(pidFile)
  }
}

/** Why an image is not served, in qemu-nbd's words. */
function servingFailure(error: unknown, { socket, bind, port }: NbdArguments): unknown {
  if (!(error instanceof Qcow2Error)) return error
  if (error.code === 'ERR_QCOW2_NO_BITMAP') {
    const name = /'([^']*)'/.exec(error.message)?.[1] ?? ''
    return new CommandFailure(`Bitmap '${name}' is not found`, { cause: error })
  }
  if (error.syscall !== 'bind') return error
  const where = socket ?? `${bind ?? '0.0.0.0'}:${port ?? DEFAULT_PORT}`
  const reason = strerror(error.code) ?? describeError(error)
  return new CommandFailure(`Failed to bind socket to ${where}: ${reason}`, { cause: error })
}

function writePid(path: string): void {
  try {
    writeFileSync(toName(path), `${process.pid}\n`)
  } catch (error) {
    throw new CommandFailure(`cannot create PID file: ${describeError(error)}`, { cause: error })
  }
}

function removeQuietly(path: string): void {
  try {
    unlinkSync(toName(path))
  } catch {
    // Somebody else was faster.
  }
}

/** Starts this program again as the server, and waits until it listens, or says why not. */
function fork({ verbose }: NbdArguments, session: Session): Promise<number> {
  // Loaded only here.
  const { spawn } = process.getBuiltinModule('node:child_process')
  const child = spawn(process.execPath, [...process.execArgv, ...process.argv.slice(1)], {
    detached: true,
    env: { ...session.env, ...handedOver(), [FORKED]: '1' },
    stdio: ['ignore', 'ignore', verbose ? 'inherit' : 'pipe', 'pipe'],
  })
  return new Promise((resolve, reject) => {
    let said = Buffer.alloc(0)
    let ready = false
    child.stderr?.on('data', (bytes: Buffer) => {
      said = Buffer.concat([said, bytes])
    })
    child.stdio[READY]?.on('data', () => {
      ready = true
      child.unref()
      child.stderr?.destroy()
      child.stdio[READY]?.destroy()
      resolve(0)
    })
    child.on('error', error => reject(new CommandFailure(`Failed to fork: ${error.message}`, { cause: error })))
    child.on('close', code => {
      if (ready) return
      session.stderr.write(decodeText(said))
      resolve(code ?? 1)
    })
  })
}
