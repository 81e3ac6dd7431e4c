/**
 * The examples of the README, of the guides and of the docstrings do what they say: each runs as it stands there, in a folder with the files that
 * it names.
 */

import { spawnSync } from 'node:child_process'
import { cpSync, createReadStream, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { CreateBucketCommand, S3Client } from '@aws-sdk/client-s3'
import { commit, convert, create, open, s3Target } from 'qcow2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder, writeRaw } from './api/fixtures.js'
import { execute } from './cli/run.js'
import { describeWithRedis, RedisServer } from './jobs/redis.js'
import { has, hasS3, S3_CREDENTIALS, type Serving, startNginx, startS3 } from './remote/servers.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const folder = temporaryFolder()
const files = join(folder, 'files')
const GIB = 2 ** 30
const MIB = 2 ** 20

const blocksOf = (text: string) =>
  [...text.matchAll(/^```(js|sh)\n(.*?)^```$/gms)].map(([, language, code = '']) => ({
    language,
    code,
    name: code.split('\n').find(line => /await|qcow2 /.test(line)) ?? code.split('\n', 1)[0] ?? '',
  }))

const guideOf = (name: string): string => readFileSync(join(root, 'docs', 'guides', name), 'utf8')

const blocks = blocksOf(readFileSync(join(root, 'README.md'), 'utf8'))
/** Its example starts a worker of a queue, which needs a server and a process of its own. */
const QUEUE_GUIDE = 'jobs.md'

/** What an example takes for granted. An open image is not the file that it opens. */
const GIVEN: Readonly<Record<string, string>> = {
  image: "await qcow2.open('image.qcow2', { flags: 'r+', references: 'allow' })",
  sector: 'Buffer.alloc(512, 1)',
  signal: 'AbortSignal.timeout(60_000)',
  onProgress: '() => {}',
  passphrase: "() => Promise.resolve('correct horse battery staple')",
  firstBytes: "readFileSync('disk.qcow2').subarray(0, 4096)",
  token: "() => 'a token'",
  known: "new Map([['base.qcow2', 'base.qcow2']])",
}

/** The servers that examples ask. */
const servers: Serving[] = []
const web = { origin: 'https://images.example' }
const environment: Record<string, string> = {}
const canAsk = { web: has('nginx', 'examples that ask a web server do not run'), s3: hasS3() }

/** Whether an example asks a server that is not there. */
const lacksServer = (code: string): boolean =>
  (!canAsk.web && /images\.example/.test(code)) || (!canAsk.s3 && /s3(?:Source|Target)\(/.test(code))

async function startServers(): Promise<void> {
  const serving = join(folder, 'servers')
  mkdirSync(serving)
  if (canAsk.web) {
    const nginx = await startNginx(serving, files)
    servers.push(nginx)
    web.origin = nginx.origin
  }
  if (!canAsk.s3) return
  const store = await startS3(serving)
  servers.push(store)
  const { accessKeyId, secretAccessKey } = S3_CREDENTIALS
  // As the SDK finds them.
  Object.assign(environment, {
    AWS_ACCESS_KEY_ID: accessKeyId,
    AWS_SECRET_ACCESS_KEY: secretAccessKey,
    AWS_REGION: 'us-east-1',
    AWS_ENDPOINT_URL_S3: `http://127.0.0.1:${store.upstream.port}`,
    AWS_SDK_JS_NODE_VERSION_SUPPORT_WARNING_DISABLED: 'true',
  })
  Object.assign(process.env, environment)
  const client = new S3Client({})
  await client.send(new CreateBucketCommand({ Bucket: 'images' }))
  client.destroy()
  await s3Target({ bucket: 'images', key: 'base.qcow2' }).upload(createReadStream(join(files, 'base.qcow2')))
}

afterAll(() => Promise.all(servers.map(server => server.stop())))

const library = pathToFileURL(join(root, 'dist', 'index.mjs')).href
const jobs = pathToFileURL(join(root, 'dist', 'jobs', 'index.mjs')).href

const givenIn = (code: string) =>
  Object.entries(GIVEN).filter(
    ([name]) =>
      new RegExp(`(?<!')\\b${name}\\b`).test(code) &&
      // Not declared, and no parameter of a function either.
      !new RegExp(`(const|import) (\\{[^}]*\\b)?${name}\\b|\\(\\{ ([^}]*\\b)?${name}\\b[^}]*\\}\\) =>`).test(code),
  )

function toModule(code: string): string {
  const wanted = givenIn(code)
  return [
    "import { readFileSync } from 'node:fs'",
    `import * as qcow2 from '${library}'`,
    // What an earlier example imported.
    ...(/import .*\bopen\b/.test(code) || !/\bopen\(/.test(code) ? [] : ['const { open } = qcow2']),
    ...wanted.map(([name, value]) => `const ${name} = ${value}`),
    code.replaceAll("from 'qcow2'", `from '${library}'`).replaceAll("from 'qcow2/jobs'", `from '${jobs}'`),
  ].join('\n')
}

function runModule(program: string, cwd: string, env: Readonly<Record<string, string>> = {}) {
  const asking = program.replaceAll('https://images.example', web.origin)
  const { status, stderr } = spawnSync(process.execPath, ['--input-type=module', '--eval', asking], {
    cwd,
    env: { ...process.env, ...environment, ...env },
    input: Buffer.alloc(65536, 3),
    maxBuffer: 2 ** 26,
  })
  return { status, stderr: String(stderr) }
}

const linesOf = (code: string): string[] =>
  code
    .split('\n')
    .map(line => line.replace(/^npx /, ''))
    .filter(line => line.startsWith('qcow2 '))

/** The lines of this command line; those of npm and others are left out. */
function runShell(code: string, cwd: string) {
  const cli = `qcow2() { "${process.execPath}" "${join(root, 'dist', 'cli.js')}" "$@"; }`
  const lines = linesOf(code).map(line => `echo '+ ${line.replaceAll("'", '')}'; ${line}`)
  const { status, stdout, stderr } = spawnSync('sh', ['-c', ['set -eu', cli, ...lines].join('\n')], {
    cwd,
    encoding: 'utf8',
  })
  const last = stdout.split('\n').findLast(line => line.startsWith('+ '))
  return { status, last, stderr }
}

const writeDisk = (path: string): string =>
  writeRaw(path, 20 * GIB, [
    [0, MIB],
    [4 * GIB, MIB],
  ])

beforeAll(async () => {
  mkdirSync(files)
  writeFileSync(join(files, 'key.txt'), 'correct horse battery staple')
  writeFileSync(join(files, 'new.txt'), 'correct horse battery staple')
  const at = (name: string): string => join(files, name)
  const disk = writeDisk(join(folder, 'disk.raw'))
  writeRaw(at('b.raw'), 4 * MIB, [[0, MIB]])
  await convert(at('b.raw'), at('a.qcow2'), { from: 'raw', to: 'qcow2' })
  await convert(at('b.raw'), at('upload.qcow2'), { from: 'raw', to: 'qcow2', compress: true })
  for (const name of ['disk', 'image', 'base', 'new-base']) {
    await convert(disk, at(`${name}.qcow2`), { from: 'raw', to: 'qcow2' })
  }
  for (const name of ['disk', 'image']) {
    await using image = await open(at(`${name}.qcow2`), { flags: 'r+' })
    await image.snapshots.create('nightly')
    if (name === 'image') await image.snapshots.delete('nightly')
  }
  await (await create(at('existing.qcow2'), { size: 20 * GIB })).close()
  const below = { backingFile: 'base.qcow2', backingFormat: 'qcow2' } as const
  await (await create(at('overlay.qcow2'), below)).close()
  await commit(at('overlay.qcow2'), { references: 'allow' })
  await startServers()
})

/** A folder of its own, where no file is in the way that the example makes. The large file is made anew: copying fills its holes. */
function fresh(index: number, made: readonly string[]): string {
  const own = join(folder, String(index))
  cpSync(files, own, { recursive: true, filter: path => !made.some(name => path === join(files, name)) })
  if (!made.includes('disk.raw')) writeDisk(join(own, 'disk.raw'))
  return own
}

describe('the examples of the README', () => {
  it('are found', () => {
    expect(blocks.filter(({ language }) => language === 'js').length).toBeGreaterThan(4)
    expect(blocks.filter(({ language }) => language === 'sh').length).toBeGreaterThan(1)
  })

  const examples = blocks.map((block, index) => ({ ...block, index })).filter(({ language }) => language === 'js')
  const run = ({ code, index }: { code: string; index: number }, env: Record<string, string> = {}): void => {
    const cwd = fresh(
      index,
      /convert\('(disk)\.raw', 'disk/.test(code) ? ['disk.qcow2'] : /'disk\.raw', \{/.test(code) ? ['disk.raw'] : [],
    )
    expect(runModule(toModule(code), cwd, env)).toEqual({ status: 0, stderr: '' })
  }
  it.each(examples.filter(({ code }) => !lacksServer(code)))('$name', example => run(example))

  describeWithRedis('with a queue', () => {
    const redis = new RedisServer(folder)
    beforeAll(() => redis.start())
    afterAll(() => redis.stop())

    it("the guide's example", () => {
      const [example] = blocksOf(guideOf(QUEUE_GUIDE))
      expect(example?.code).toContain('qcow2/jobs')
      run({ code: example?.code ?? '', index: blocks.length + 2 }, { REDIS_URL: redis.url })
    })

    it('three workers on one machine', async () => {
      const ended = await execute(process.execPath, [join(root, 'examples', 'jobs', 'run.mjs')], root)
      expect({ code: ended.code, stderr: ended.stderr }).toEqual({ code: 0, stderr: '' })
      expect(ended.stdout).toContain('completed: 12, dead: 0')
      expect(ended.stdout).toContain('13 files: ')
    })
  })

  it('work one after the other, as a newcomer tries the first two', () => {
    const cwd = fresh(blocks.length + 1, ['disk.qcow2'])
    const [install, first] = blocks
    expect(install?.code).toContain('npx qcow2 convert')
    expect(runShell(install?.code ?? '', cwd)).toMatchObject({ status: 0, stderr: '' })
    expect(runModule(toModule(first?.code ?? ''), cwd)).toEqual({ status: 0, stderr: '' })
  })

  it.skipIf(process.platform === 'win32')('of the command line', () => {
    const all = blocks.filter(({ language }) => language === 'sh').map(({ code }) => code)
    expect(linesOf(all.join('')).length).toBeGreaterThan(8)
    const cwd = fresh(blocks.length, ['disk.qcow2'])
    expect(runShell(all.join(''), cwd)).toMatchObject({ status: 0, stderr: '' })
    expect(readFileSync(join(cwd, 'disk.svg'), 'utf8')).toContain('<svg')
  })
})

/** One example after the other in one process, each with names of its own. */
const together = (examples: readonly { readonly code: string; readonly name: string }[], between = ''): string =>
  examples
    .map(({ code, name }) => {
      const given = givenIn(code)
      const inside = code
        .replaceAll(/^import \{([^}]*)\} from '([^']+)'$/gm, (_, names: string, from: string) => {
          const module = from === 'qcow2' ? 'qcow2' : `await import('${from}')`
          return `const {${names.replaceAll(' as ', ': ')}} = ${module}`
        })
        .trimEnd()
      const end = given.some(([known]) => known === 'image') ? 'await image.close()' : ''
      const values = given.map(([known, value]) => `const ${known} = ${value}`)
      return [between, `at = ${JSON.stringify(name)}`, '{', ...values, inside, end, '}'].join('\n')
    })
    .join('\n')

const alone = (code: string): string =>
  [
    "import { readFileSync } from 'node:fs'",
    `import * as qcow2 from '${library}'`,
    "let at = ''",
    "process.on('exit', code => { if (code !== 0) console.error('in the example:', at) })",
    code,
  ].join('\n')

describe('the examples of the guides, from the first to the last', () => {
  const guides = readdirSync(join(root, 'docs', 'guides')).filter(name => name !== QUEUE_GUIDE)
  it('are found', () => expect(guides.length).toBeGreaterThan(12))

  it.each(guides)('%s', guide => {
    const found = blocksOf(guideOf(guide)).filter(({ code }) => !lacksServer(code))
    const cwd = fresh(100 + guides.indexOf(guide), [])
    // What follows each other in one language is one program.
    for (let first = 0; first < found.length; ) {
      const language = found[first]?.language
      let next = first + 1
      while (next < found.length && found[next]?.language === language) next += 1
      const run = found.slice(first, next)
      const ended =
        language === 'js' ? runModule(alone(together(run)), cwd) : runShell(run.map(({ code }) => code).join(''), cwd)
      expect(ended).toMatchObject({ status: 0, stderr: '' })
      first = next
    }
  })
})

it('the examples of the docstrings, each in a folder of its own', () => {
  const sources = readdirSync(join(root, 'src'), { recursive: true, encoding: 'utf8' }).filter(name =>
    name.endsWith('.ts'),
  )
  const examples = sources.flatMap(name => {
    const comments = readFileSync(join(root, 'src', name), 'utf8')
      .replaceAll(/^ +(?=\*)/gm, '')
      .replaceAll(/^\* ?/gm, '')
    return blocksOf(comments)
      .filter(({ code }) => !lacksServer(code))
      .map(example => ({ ...example, name: `${name}: ${example.name}` }))
  })
  expect(examples.length).toBeGreaterThan(25)
  const folders = examples.map((_, index) => fresh(200 + index, []))
  const program = `const folders = ${JSON.stringify(folders)}\n${together(examples, 'process.chdir(folders.shift())')}`
  expect(runModule(alone(program), folder)).toEqual({ status: 0, stderr: '' })
})
