import type { Command } from 'commander'
import { Qcow2Error } from '../../index.js'
import { type JobWorkerOptions, startWorker, type WorkerEvent } from '../../jobs/index.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { rateLimit, wholeNumber } from '../grammar.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'

interface WorkerArguments {
  readonly redis?: string
  readonly root?: readonly string[]
  readonly queue?: string
  readonly prefix?: string
  readonly concurrency?: number
  readonly threads?: number
  readonly rate?: number | bigint
  readonly references?: boolean
  readonly uploadTo?: readonly string[]
  readonly lock?: number
  readonly grace?: number
  readonly timeout?: number
  readonly quiet?: boolean
}

const gather = (value: string, previous: readonly string[] = []): string[] => [...previous, value]

export function declareWorker(program: Command, run: Runner): void {
  program
    .command('worker')
    .summary('do jobs of a queue')
    .description(
      'Take jobs off a queue in Redis or Valkey, where programs put them by qcow2/jobs, and do them on files below the roots: convert, check, ' +
        'inspect, compact, upload. A line on standard output says what happens. SIGTERM and SIGINT let the running jobs finish, give back ' +
        'what takes longer than --grace, and end with 0. Needs the packages bullmq and ioredis.',
    )
    .usage('--redis URL --root FOLDER [options]')
    .argument('[rest...]')
    .option(
      '--redis <url>',
      'where the queue is: redis://HOST:PORT, rediss:// with TLS, unix:///PATH (default: QCOW2_REDIS)',
    )
    .option('--root <folder>', 'a folder that jobs may name files in; relative names start from the first', gather)
    .option('--queue <name>', 'name of the queue (default: qcow2)')
    .option('--prefix <prefix>', 'what its keys begin with (default: bull)')
    .option('--concurrency <jobs>', 'jobs at once (default: 1)', wholeNumber('number of jobs', 1, 64))
    .option('--threads <count>', 'worker threads of one job', wholeNumber('number of threads', 1, 64))
    .option('-r, --rate <bytes>', 'bytes a second that all converts together read', rateLimit)
    .option('--references', 'follow what images name, where it lies below the roots')
    .option('--upload-to <url>', 'what addresses of uploads begin with', gather)
    .option(
      '--lock <seconds>',
      'a worker is lost after this time without word from it (default: 30)',
      wholeNumber('time', 1, 3600),
    )
    .option('--grace <seconds>', 'time for running jobs at the end (default: 30)', wholeNumber('time', 0, 2 ** 21))
    .option(
      '--timeout <seconds>',
      'time to wait for the answer of the queue (default: 10)',
      wholeNumber('time', 1, 3600),
    )
    .option('-q, --quiet', 'print errors only')
    .action((rest: string[], options: WorkerArguments) => run(session => work(rest, options, session)))
}

async function work(rest: readonly string[], options: WorkerArguments, session: Session): Promise<number> {
  // From the environment, since others see a command line; it can have a password in it.
  const { redis = session.env['QCOW2_REDIS'], root, lock, grace, timeout } = options
  if (rest.length > 0) throw new UsageFailure(`Unexpected argument '${rest[0]}'`)
  if (redis === undefined) throw new UsageFailure('Expecting --redis, the address of the queue')
  if (root === undefined) throw new UsageFailure('Expecting --root, a folder that jobs may name files in')
  const { queue, prefix, concurrency, threads, rate, references, uploadTo } = options
  const how: JobWorkerOptions = {
    connection: redis,
    roots: root,
    queue,
    prefix,
    concurrency,
    threads,
    rate,
    references: references === true ? 'roots' : 'deny',
    uploads: uploadTo,
    lockDuration: lock === undefined ? undefined : lock * 1000,
    grace: grace === undefined ? undefined : grace * 1000,
    timeout: timeout === undefined ? undefined : timeout * 1000,
    onEvent: event => print(event, options, session),
    signal: session.signal,
  }
  const worker = await startWorker(how).catch(error => {
    if (!(error instanceof Qcow2Error) || error.syscall !== 'connect') throw error
    throw new CommandFailure(`The queue cannot be reached: ${error.message}`, { cause: error })
  })
  say(`${worker.name} ready`, options, session)
  await worker.closed
  return 0
}

/** Names and reasons come from others: they stay on their line. */
const line = (text: string): string => text.replace(/\p{Cc}+/gu, ' ')

function say(text: string, { quiet = false }: WorkerArguments, { stdout }: Session): void {
  if (quiet) return
  stdout.write(`${line(text)}\n`)
  stdout.flush()
}

/** A queue that is away is tried again many times a minute: that is said once. */
let lastError = ''

function print(event: WorkerEvent, options: WorkerArguments, session: Session): void {
  if (event.type !== 'error') {
    lastError = ''
    say(
      event.type === 'stalled' ? `${event.id} stalled` : `${event.id} ${event.kind} ${wordsOf(event)}`,
      options,
      session,
    )
    return
  }
  const message = line(event.error.message)
  if (message === lastError) return
  lastError = message
  session.stderr.write(`${session.program}: ${message}\n`)
  session.stderr.flush()
}

function wordsOf(event: Exclude<WorkerEvent, { type: 'error' | 'stalled' }>): string {
  switch (event.type) {
    case 'started':
      return `started, attempt ${event.attempt}`
    case 'completed':
      return `completed in ${event.durationMs} ms`
    case 'failed':
      return `${event.final ? 'dead' : 'failed'}: ${event.reason}`
    default:
      return event.type
  }
}
