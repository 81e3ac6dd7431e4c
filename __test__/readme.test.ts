/** The examples of the README do what they say: each runs as it stands there, in a folder with the files that it names. */

import { spawnSync } from 'node:child_process'
import { cpSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { commit, convert, create, open } from 'qcow2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder, writeRaw } from './api/fixtures.js'
import { execute } from './cli/run.js'
import { describeWithRedis, RedisServer } from './jobs/redis.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const folder = temporaryFolder()
const files = join(folder, 'files')
const GIB = 2 ** 30
const MIB = 2 ** 20

const blocks = [...readFileSync(join(root, 'README.md'), 'utf8').matchAll(/^```(js|sh)\n(.*?)^```$/gms)].map(
  ([, language, code = '']) => ({
    language,
    code,
    name: code.split('\n').find(line => /await|qcow2 /.test(line)) ?? '',
  }),
)

/** What an example takes for granted. An open image is not the file that it opens. */
const GIVEN: Readonly<Record<string, string>> = {
  image: "await qcow2.open('image.qcow2', { flags: 'r+', references: 'allow' })",
  sector: 'Buffer.alloc(512, 1)',
  signal: 'AbortSignal.timeout(60_000)',
  onProgress: '() => {}',
  thawTheGuest: '() => {}',
  save: '() => Promise.resolve()',
  passphrase: "() => Promise.resolve('correct horse battery staple')",
  firstBytes: "readFileSync('disk.qcow2').subarray(0, 4096)",
  known: "new Map([['base.qcow2', 'base.qcow2']])",
}

function toModule(code: string): string {
  const library = pathToFileURL(join(root, 'dist', 'index.mjs')).href
  const jobs = pathToFileURL(join(root, 'dist', 'jobs', 'index.mjs')).href
  const wanted = Object.entries(GIVEN).filter(
    ([name]) => new RegExp(`\\b${name}\\b`).test(code) && !new RegExp(`const ${name} =`).test(code),
  )
  return [
    "import { readFileSync } from 'node:fs'",
    `import * as qcow2 from '${library}'`,
    // What an earlier example imported.
    ...(/import .*\bopen\b/.test(code) || !/\bopen\(/.test(code) ? [] : ['const { open } = qcow2']),
    ...wanted.map(([name, value]) => `const ${name} = ${value}`),
    code.replaceAll("from 'qcow2'", `from '${library}'`).replaceAll("from 'qcow2/jobs'", `from '${jobs}'`),
  ].join('\n')
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
    expect(blocks.filter(({ language }) => language === 'js').length).toBeGreaterThan(10)
    expect(blocks.filter(({ language }) => language === 'sh').length).toBeGreaterThan(1)
  })

  const examples = blocks.map((block, index) => ({ ...block, index })).filter(({ language }) => language === 'js')
  const withQueue = ({ code }: { code: string }): boolean => code.includes('qcow2/jobs')
  const run = ({ code, index }: { code: string; index: number }, env: NodeJS.ProcessEnv = {}): void => {
    const cwd = fresh(
      index,
      /convert\('(disk)\.raw', 'disk/.test(code) ? ['disk.qcow2'] : /'disk\.raw', \{/.test(code) ? ['disk.raw'] : [],
    )
    const ended = spawnSync(process.execPath, ['--input-type=module', '--eval', toModule(code)], {
      cwd,
      input: Buffer.alloc(65536, 3),
      maxBuffer: 2 ** 26,
      env: { ...process.env, ...env },
    })
    expect({ status: ended.status, stderr: String(ended.stderr) }).toEqual({ status: 0, stderr: '' })
  }
  it.each(examples.filter(example => !withQueue(example)))('$name', example => run(example))

  describeWithRedis('with a queue', () => {
    const redis = new RedisServer(folder)
    beforeAll(() => redis.start())
    afterAll(() => redis.stop())

    it.each(examples.filter(withQueue))('$name', example => run(example, { REDIS_URL: redis.url }))

    it('three workers on one machine', async () => {
      const ended = await execute(process.execPath, [join(root, 'examples', 'jobs', 'run.mjs')], root)
      expect({ code: ended.code, stderr: ended.stderr }).toEqual({ code: 0, stderr: '' })
      expect(ended.stdout).toContain('completed: 12, dead: 0')
      expect(ended.stdout).toContain('13 files: ')
    })
  })

  it.skipIf(process.platform === 'win32')('of the command line', () => {
    const lines = blocks
      .filter(({ language }) => language === 'sh')
      .flatMap(({ code }) => code.split('\n'))
      .map(line => line.replace(/^npx /, ''))
      .filter(line => line.startsWith('qcow2 '))
    expect(lines.length).toBeGreaterThan(15)
    const cwd = fresh(blocks.length, [])
    const cli = `qcow2() { "${process.execPath}" "${join(root, 'dist', 'cli.js')}" "$@"; }`
    const script = ['set -eu', cli, ...lines.map(line => `echo '+ ${line.replaceAll("'", '')}'; ${line}`)].join('\n')
    const ended = spawnSync('sh', ['-c', script], { cwd, encoding: 'utf8' })
    const last = ended.stdout
      .split('\n')
      .filter(line => line.startsWith('+ '))
      .at(-1)
    expect({ status: ended.status, last, stderr: ended.stderr }).toMatchObject({ status: 0, stderr: '' })
    expect(readFileSync(join(cwd, 'disk.svg'), 'utf8')).toContain('<svg')
  })
})
