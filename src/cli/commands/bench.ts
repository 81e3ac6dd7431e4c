import { type Command, Option } from 'commander'
import type { Image } from '../../index.js'
import { describeError } from '../errors.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { fixed } from '../format/number.js'
import { SOURCES, takeDriverSyntax, toCacheMode } from '../grammar.js'
import { withImage } from '../images.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'
import { sizeArgument } from '../size.js'

interface BenchArguments {
  readonly format?: string
  readonly count: number
  readonly depth: number
  readonly bufferSize: number
  readonly offset: number
  readonly stepSize?: number
  readonly cache: string
  readonly write?: boolean
  readonly pattern?: number
  readonly flushInterval?: number
  /** commander turns `--no-drain` into this. */
  readonly drain: boolean
  readonly forceShare?: boolean
}

const INT_MAX = 2n ** 31n - 1n

const number =
  (what: string, min: bigint, max = INT_MAX) =>
  (text: string): number =>
    Number(sizeArgument(what, text, { min, max }))

/** As {@link number}; what is wrong with a count is not its suffix. */
const count =
  (what: string) =>
  (text: string): number => {
    try {
      return number(what, 1n)(text)
    } catch (error) {
      throw error instanceof CommandFailure ? new CommandFailure(error.message, { cause: error }) : error
    }
  }

const CACHE_MODES = ['none', 'off', 'writeback', 'unsafe', 'directsync', 'writethrough']

function cacheMode(mode: string): string {
  if (CACHE_MODES.includes(mode)) return mode
  throw new CommandFailure('Invalid cache mode')
}

function aioMode(mode: string): string {
  if (['threads', 'native', 'io_uring'].includes(mode)) return mode
  throw new CommandFailure(`Invalid aio option: ${mode}`)
}

export function declareBench(program: Command, run: Runner): void {
  const command = program
    .command('bench')
    .summary('measure requests on an image')
    .description(
      'Send many requests of one kind to an image and tell how long they take. -w overwrites what the image holds.',
    )
    .usage('[options] FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${SOURCES} (default: what it looks like)`)
    .option('-c, --count <n>', 'how many requests', count('request count'), 75000)
    .option('-d, --depth <n>', 'how many at the same time', count('queue depth'), 64)
    .option('-s, --buffer-size <size>', 'bytes of each request', number('buffer size', 1n), 4096)
    .option('-o, --offset <offset>', 'where the first one begins', number('offset', 0n, 2n ** 53n - 1n), 0)
    .option('-S, --step-size <size>', 'from one to the next (default: the buffer size)', number('step size', 0n))
    .option('-w, --write', 'write instead of read')
    .option('--pattern <byte>', 'write this byte instead of zeroes', number('pattern byte', 0n, 255n))
    .option('--flush-interval <n>', 'with -w: flush after so many requests', number('flush interval', 0n))
    .option('--no-drain', 'do not wait for the requests before a flush')
    .option('-t, --cache <mode>', 'cache mode of the image', cacheMode, 'writeback')
    .addOption(new Option('-i, --aio <mode>', 'as qemu-img takes it: threads, native, io_uring').argParser(aioMode))
    .option('-n, --native', 'as qemu-img takes it')
    .option('-U, --force-share', 'open an image that another process uses')
    .option('-q, --quiet', 'as qemu-img takes it')
  takeDriverSyntax(command)
  command.action((files: string[], options: BenchArguments) => run(session => bench(files, options, session)))
}

async function bench(files: readonly string[], options: BenchArguments, session: Session): Promise<number> {
  const [filename] = files
  if (filename === undefined || files.length !== 1) throw new UsageFailure('Expecting one image file name')
  const { write = false, flushInterval = 0, depth, drain, forceShare, format } = options
  if (flushInterval > 0 && !write) throw new CommandFailure('--flush-interval is only available in write tests')
  if (flushInterval > 0 && flushInterval < depth) throw new CommandFailure("Flush interval can't be smaller than depth")
  if (write && forceShare) {
    throw new CommandFailure(`Could not open '${filename}': force-share=on can only be used with read-only images`)
  }
  if (write) session.objects.refuseReadOnly(filename)
  const cache = toCacheMode(options.cache)
  const request = { filename, format, forceShare, cache, ...(write && { flags: 'r+' as const }) }
  return withImage(request, session, async image => {
    announce(options, session)
    const begin = performance.now()
    await new Requests(image, options, session.signal, write && drain ? flushInterval : 0).run().catch(error => {
      if (session.signal.aborted) throw error
      throw new CommandFailure(`Failed request: ${describeError(error)}`, { cause: error })
    })
    session.stdout.write(`Run completed in ${fixed((performance.now() - begin) / 1000, 3)} seconds.\n`)
    return 0
  })
}

function announce(
  { count, write, bufferSize, depth, offset, stepSize, flushInterval }: BenchArguments,
  session: Session,
): void {
  const kind = write ? 'write' : 'read'
  session.stdout.write(
    `Sending ${count} ${kind} requests, ${bufferSize} bytes each, ${depth} in parallel ` +
      `(starting at offset ${offset}, step size ${stepSize || bufferSize})\n`,
  )
  if (flushInterval) session.stdout.write(`Sending flush every ${flushInterval} requests\n`)
  session.stdout.flush()
}

/** The requests of one run, so many at the same time, each at the place of its turn. */
class Requests {
  readonly #image: Image
  readonly #options: BenchArguments
  readonly #signal: AbortSignal
  /** Requests between two flushes that wait for all before them; 0 for none. */
  readonly #drainEach: number
  #position: number
  #begun = 0

  constructor(image: Image, options: BenchArguments, signal: AbortSignal, drainEach: number) {
    this.#image = image
    this.#options = options
    this.#signal = signal
    this.#drainEach = drainEach
    this.#position = options.offset
  }

  async run(): Promise<void> {
    const { count } = this.#options
    while (this.#begun < count) {
      const until = this.#drainEach > 0 ? Math.min(count, this.#begun + this.#drainEach) : count
      const workers = Math.min(this.#options.depth, until - this.#begun)
      await Promise.all(Array.from({ length: workers }, () => this.#work(until)))
      if (this.#drainEach > 0) await this.#image.datasync()
    }
  }

  /** One after the other until all have begun. */
  async #work(until: number): Promise<void> {
    const { write, bufferSize, pattern = 0, flushInterval = 0, drain } = this.#options
    const buffer = Buffer.alloc(bufferSize, pattern)
    while (this.#begun < until) {
      this.#signal.throwIfAborted()
      this.#begun += 1
      const flushes = flushInterval > 0 && !drain && this.#begun % flushInterval === 0
      const position = this.#next()
      if (write) await this.#image.write(buffer, { position })
      else await this.#read(buffer, position)
      if (flushes) await this.#image.datasync()
    }
  }

  async #read(buffer: Buffer, position: number): Promise<void> {
    const { bytesRead } = await this.#image.read(buffer, { position })
    if (bytesRead < buffer.length) throw Object.assign(new Error('the request ends behind the disk'), { code: 'EIO' })
  }

  /** Behind the end of the disk it goes on at its beginning. */
  #next(): number {
    const position = this.#position
    const { bufferSize, stepSize } = this.#options
    const room = Number(this.#image.virtualSizeBigInt) - bufferSize
    const next = position + (stepSize || bufferSize)
    this.#position = room <= 0 ? 0 : next > room ? next % room : next
    return position
  }
}
