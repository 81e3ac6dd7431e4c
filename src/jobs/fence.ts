/** What is kept with a job beside what BullMQ keeps: who asks for it to be cancelled, and which file is to be its target. */

import type { Job, Queue, RedisQueueBackend } from 'bullmq'
import type { Fence, Intent } from './target.js'

/** Fields of the hash that a job is in Redis: they go when it goes. */
const INTENT = 'qcow2:intent'
const CANCEL = 'qcow2:cancel'

/** KEYS: lock, job. ARGV: token, milliseconds, field, value. */
const HOLD = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
return 1`

/** KEYS: job. ARGV: field, value. */
const MARK = `
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1`

const SCRIPTS = {
  qcow2Hold: { numberOfKeys: 2, lua: HOLD },
  qcow2Mark: { numberOfKeys: 1, lua: MARK },
} as const

type Keeper = Pick<Queue, 'toKey'> & { readonly backend: Pick<RedisQueueBackend, 'client'> }

async function call(keeper: Keeper, name: keyof typeof SCRIPTS, args: readonly (string | number)[]): Promise<number> {
  const client = await keeper.backend.client
  client.defineCommand(name, SCRIPTS[name])
  return Number(await client.runCommand(name, [...args]))
}

async function field(keeper: Keeper, id: string, name: string): Promise<string | undefined> {
  const client = await keeper.backend.client
  return (await client.hget(keeper.toKey(id), name)) ?? undefined
}

/** Asks for a job to be cancelled. False where there is no such job. */
export const markCancelled = async (keeper: Keeper, id: string, reason: string): Promise<boolean> =>
  (await call(keeper, 'qcow2Mark', [keeper.toKey(id), CANCEL, reason])) === 1

/** Why a job is to be cancelled, if it is. */
export const cancelledBecause = (keeper: Keeper, id: string): Promise<string | undefined> => field(keeper, id, CANCEL)

/** Forgets how often workers were lost with the job: BullMQ counts that for as long as it has it. */
export async function forgetStalls(keeper: Keeper, id: string): Promise<void> {
  const client = await keeper.backend.client
  await client.hdel(keeper.toKey(id), 'stc')
}

/** The fence of an attempt, which has the lock by a token. */
export function fenceOf(keeper: Keeper, { id = '' }: Pick<Job, 'id'>, token: string, lockDuration: number): Fence {
  const job = keeper.toKey(id)
  return {
    hold: async intent => {
      const given = [`${job}:lock`, job, token, lockDuration, INTENT, JSON.stringify(intent)]
      return (await call(keeper, 'qcow2Hold', given)) === 1
    },
    intent: async () => readIntent(await field(keeper, id, INTENT)),
  }
}

/** An intent that cannot be read is none: then the target is somebody else's. */
function readIntent(text: string | undefined): Intent | undefined {
  if (text === undefined) return undefined
  try {
    const { made, result } = JSON.parse(text)
    return typeof made === 'string' ? { made, result } : undefined
  } catch {
    return undefined
  }
}
